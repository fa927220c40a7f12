"""The run folder: its lock, the check that all machines share it, and what is said when it cannot be written."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fastjepa import distributed
from fastjepa.errors import RunFolderError
from fastjepa.run.folder import RunFolder, explain_write_errors
from tests.support.reliability import Record


def test_folders_of_one_name_and_inode_number_that_the_ranks_do_not_share_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two machines without a shared file system may have the same path and inode number. Threads stand for their ranks."""
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


HOLDER = """
import fcntl, sys
file = open(sys.argv[1], "a+b", buffering=0)
fcntl.lockf(file, fcntl.LOCK_EX)
file.write(b"process 17 on node2")
print("held", flush=True)
sys.stdin.read()
"""


@pytest.mark.processes
def test_a_folder_that_another_process_holds_is_refused_until_that_process_ends(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / ".lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    message = r"another run is writing there \(process 17 on node2\)\. Stop it, or choose another output_dir"
    with pytest.raises(RunFolderError, match=message), RunFolder(tmp_path).locked():
        pass
    holder.kill()
    holder.communicate()
    with RunFolder(tmp_path).locked():
        assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")


def test_a_file_system_without_locks_is_used_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    with RunFolder(tmp_path).locked():
        assert "this file system has no locks" in caplog.text


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(RunFolderError, match=r"output_dir = .*/run: cannot be written .*Choose another output_dir"):
        RunFolder(tmp_path / "run").create()


def test_skipped_steps_are_appended(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_skipped_steps([{"step": 1}, {"step": 2}])
    folder.write_skipped_steps([{"step": 5}])
    assert [json.loads(line)["step"] for line in folder.skipped_steps.read_text().splitlines()] == [1, 2, 5]


def test_only_errors_of_writing_are_turned_into_run_folder_errors() -> None:
    message = r"^a file: cannot be written \(No space left on device\)\. Delete another$"
    with pytest.raises(RunFolderError, match=message), explain_write_errors("a file", "Delete another"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(ValueError, match="a bug"), explain_write_errors("a file", "Delete another"):
        raise ValueError("a bug")


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
