"""The run folder: its lock, the check that all machines share it, and what is said when it cannot be written."""

from __future__ import annotations

import os
import resource
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fastjepa import distributed
from fastjepa.errors import RunFolderError
from fastjepa.run.folder import RunFolder
from tests.support.reliability import Record


def test_folders_of_one_name_and_inode_number_that_the_ranks_do_not_share_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two machines, whose ranks are threads here."""
    turn, said, this = threading.Barrier(2, timeout=50), ["", ""], threading.local()

    def gather_objects(value: object, _group: object = None) -> list[object]:
        said_by: list[object] = said  # type: ignore[assignment]
        said_by[this.rank] = value
        turn.wait()
        values = list(said_by)
        turn.wait()
        return values

    monkeypatch.setattr(distributed, "gather_objects", gather_objects)
    monkeypatch.setattr(distributed, "rank", lambda: this.rank)

    def numbered_alike(path: Path, **_: object) -> os.stat_result:
        mode, _inode, *others = os.stat(path)  # noqa: PTH116  # Path's is this one
        return os.stat_result((mode, 7, *others))

    def check(rank: int, path: Path) -> str:
        this.rank = rank
        folder = RunFolder(path)
        folder.create()
        try:
            folder.check_shared()
        except RunFolderError as error:
            return str(error)
        return "shared"

    with ThreadPoolExecutor(2) as ranks:
        assert [*ranks.map(check, range(2), [tmp_path / "a"] * 2)] == ["shared"] * 2
        monkeypatch.setattr(Path, "stat", numbered_alike)
        told = [*ranks.map(check, range(2), [tmp_path / "a", tmp_path / "b"])]
    assert all("but rank 1 does not see there what rank 0 wrote" in each for each in told), told
    monkeypatch.undo()
    assert not list(tmp_path.glob("*/.*"))


def test_a_read_only_folder_is_refused(read_only_folder: Path, record: Record) -> None:
    with pytest.raises(RunFolderError, match="cannot be written") as found, RunFolder(read_only_folder).locked():
        pass
    record("a run folder that is read-only", f"refused: {found.value}".replace(f"{read_only_folder}", "RUN"), "nothing")


def test_a_disk_that_is_full_before_the_start_is_named(tmp_path: Path, record: Record) -> None:
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        with pytest.raises(RunFolderError, match="cannot be written") as found, RunFolder(tmp_path).locked():
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    record("a disk that is full before the start", f"refused: {found.value}".replace(f"{tmp_path}", "RUN"), "nothing")
