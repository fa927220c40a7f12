"""Compressed images are unpacked once, whatever happens to processes, disks and caches."""

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fastjepa.errors import DataError
from tests.support.tables import IMAGES, content, images, listed, table, unpacked, write_parquet


def test_parquet_is_unpacked_once(tmp_path: Path, own_cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    file = write_parquet(tmp_path / "a.parquet", table({"image": images()}))
    first = content(listed(file).dataset)
    (written,) = unpacked(own_cache)
    assert written.read_bytes() == b"".join(IMAGES)
    assert written.stat().st_mtime_ns == file.stat().st_mtime_ns
    assert f"unpacked into {written.parent}" in caplog.text
    state = written.stat()
    assert content(listed(file).dataset) == first == IMAGES
    assert unpacked(own_cache) == [written]
    assert written.stat().st_ino == state.st_ino
    assert {path.name for path in (own_cache / "tables").iterdir()} == {
        written.parent.name,
        f"{written.parent.name}.lock",
    }


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "images.bin").unlink(),
        lambda folder: os.truncate(folder / "images.bin", 10),
        lambda folder: (folder / "images.bin").write_bytes(bytes((folder / "images.bin").stat().st_size)),
        lambda folder: (folder / "spans.npy").write_bytes(b"junk"),
        lambda folder: (folder / "spans.npy").unlink(),
        shutil.rmtree,
    ],
)
def test_unpacked_images_that_are_damaged_are_unpacked_anew(
    tmp_path: Path, own_cache: Path, damage: Callable[[Path], object]
) -> None:
    file = write_parquet(tmp_path / "a.parquet", table({"image": images()}))
    os.utime(file, (1e9, 1e9))  # long ago
    listed(file)
    damage(unpacked(own_cache)[0].parent)
    assert content(listed(file).dataset) == IMAGES


def test_a_changed_parquet_file_is_unpacked_anew(tmp_path: Path, own_cache: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet", table({"image": images()}))
    listed(file)
    write_parquet(file, table({"image": images(IMAGES[::-1])}))
    os.utime(file, (1, 1))
    assert content(listed(file).dataset) == IMAGES[::-1]
    assert len(unpacked(own_cache)) == 2


@pytest.mark.processes
def test_processes_that_unpack_at_the_same_time_leave_one_result(tmp_path: Path, own_cache: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet", table({"image": images()}))
    code = (
        "import sys; from fastjepa.data.sources.tables import list_tables; d = list_tables(sys.argv[1:]).dataset; "
        "print(sum(len(d.read(i, 9999)) for i in range(len(d))))"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, str(file)]
    racers = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [int(racer.communicate(timeout=300)[0]) for racer in racers] == [sum(map(len, IMAGES))] * 2
    assert len(list((own_cache / "tables").iterdir())) == 2  # the folder and its lock


def test_the_folder_that_a_killed_process_left_is_removed(tmp_path: Path, own_cache: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet", table({"image": images()}))
    listed(file)
    folder = unpacked(own_cache)[0].parent
    shutil.rmtree(folder)
    (folder.parent / f".{folder.name}-killed").mkdir()
    listed(file)
    assert not list(folder.parent.glob(".*"))


def test_a_disk_that_is_too_small_is_noticed_before_unpacking(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_parquet(tmp_path / "a.parquet", table({"image": images()}))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=64 << 20))
    with pytest.raises(
        DataError, match=rf"1 tables are compressed.* GB in {own_cache}; 0\.07 GB are free.*FASTJEPA_CACHE"
    ):
        listed(file)
    assert unpacked(own_cache) == []


def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    file = write_parquet(tmp_path / "a.parquet", table({"image": images()}))
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match=rf"{own_cache}/tables \(No space left on device\): set FASTJEPA_CACHE"):
        listed(file)
    assert [path.suffix for path in (own_cache / "tables").iterdir()] == [".lock"]


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FASTJEPA_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(DataError, match=r"file/cache \(Not a directory\): set FASTJEPA_CACHE"):
        listed(write_parquet(tmp_path / "a.parquet", table({"image": images()})))
