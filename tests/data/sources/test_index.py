"""The index: a data set is listed once, and again when it has changed or its index is damaged."""

import errno
import json
import logging
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fastjepa.config import DataConfig
from fastjepa.data.dataset import ImageDataset, Spans, Strings
from fastjepa.data.sources import folder as folder_module
from fastjepa.data.sources import index as index_module
from fastjepa.data.sources import open_dataset
from fastjepa.data.sources.index import Listing, indexed

HOUR = 3600.0


@pytest.fixture(autouse=True)
def info(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Images in nested folders that have not changed for an hour."""
    root = tmp_path / "images"
    for name in ("a/1.png", "b/2.png", "b/deep/er/3.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    settle(root)
    return root


def settle(root: Path) -> None:
    for path in (root, *root.rglob("*")):
        os.utime(path, (time.time() - HOUR, path.stat().st_mtime - HOUR))


def names(root: Path) -> list[str]:
    dataset = open_dataset(DataConfig(source=str(root)), "train")
    assert dataset is not None
    return [dataset.name(i) for i in range(len(dataset))]


def times_listed(caplog: pytest.LogCaptureFixture) -> int:
    return sum("images listed in" in message for message in caplog.messages)


def test_a_list_is_made_once_and_is_the_same_afterwards(images: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = DataConfig(source=str(images))
    first, second = (open_dataset(config, "train") for _ in range(2))
    assert times_listed(caplog) == 1
    assert first is not None
    assert second is not None
    assert list(first.names) == list(second.names) == [b"a/1.png", b"b/2.png", b"b/deep/er/3.png"]
    assert [second.names[i] for i in range(3)] == list(second.names)
    assert first.fingerprint == second.fingerprint
    assert first.root == second.root == str(images)
    assert first.class_names == second.class_names == ("a", "b")
    assert first.labels is not None
    assert second.labels is not None
    assert first.labels.tolist() == second.labels.tolist() == [0, 1, 1]
    assert second.read(2, 99) == b"b/deep/er/3.png"
    assert isinstance(second.names.text.base, np.memmap)  # ranks share it


def test_a_listing_comes_back_whole_from_the_cache(tmp_path: Path) -> None:
    spans = Spans(
        Strings.of([b"x.tar", b"\xff"]), np.array([0, -1, 1], np.int32), np.array([5, 0, 2**40]), np.array([9, 0, -1])
    )
    made = ImageDataset(os.fsdecode(b"/root\xff"), Strings.of([b"\xfe", b"", b"c"]), None, (), spans)
    listed = Listing(made, [os.fsencode(tmp_path / "missing")], ["a warning ä"])
    indexed("key", lambda: listed)
    found = indexed("key", lambda: pytest.fail("listed again"))
    assert os.fsencode(found.root) == b"/root\xff"
    assert list(found.names) == [b"\xfe", b"", b"c"]
    assert found.fingerprint == made.fingerprint
    assert found.spans is not None
    assert list(found.spans.files) == [b"x.tar", b"\xff"]
    assert [column.tolist() for column in found.spans[1:]] == [[0, -1, 1], [5, 0, 2**40], [9, 0, -1]]


def test_warnings_are_repeated_each_time(caplog: pytest.LogCaptureFixture) -> None:
    made = ImageDataset("/", Strings.of([b"a"]), None, ())
    for _ in range(2):
        indexed("key", lambda: Listing(made, [], ["mind the gap"]))
    assert caplog.messages.count("mind the gap") == 2
    assert times_listed(caplog) == 1


CHANGES: dict[str, Callable[[Path], object]] = {
    "added": lambda root: (root / "b/deep/er/4.png").touch(),
    "removed": lambda root: (root / "b/deep/er/3.png").unlink(),
    "renamed": lambda root: (root / "b/deep/er/3.png").rename(root / "b/deep/er/5.png"),
    "moved": lambda root: (root / "b/deep/er/3.png").rename(root / "a/3.png"),
    "folder added": lambda root: shutil.copytree(root / "b/deep", root / "a/deep"),
    "folder removed": lambda root: shutil.rmtree(root / "b/deep"),
    "folder renamed": lambda root: (root / "b/deep/er").rename(root / "b/deep/x"),
    "first level": lambda root: (root / "a").rename(root / "c"),
    "root": lambda root: (root / "0.png").touch(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_at_any_depth_is_noticed(
    images: Path, change: Callable[[Path], object], caplog: pytest.LogCaptureFixture
) -> None:
    before = names(images)
    change(images)
    after = names(images)
    assert after != before
    assert after == sorted(str(path.relative_to(images)) for path in images.rglob("*.png"))
    settle(images)
    assert names(images) == names(images) == after
    assert times_listed(caplog) == 3  # and not a fourth time


def test_a_folder_that_had_just_changed_is_listed_again(images: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A second change within the clock's tick would leave no trace."""
    just_now = time.time()
    os.utime(images / "a", (just_now, just_now))
    names(images)
    (images / "a" / "9.png").touch()
    os.utime(images / "a", (just_now, just_now))
    assert "a/9.png" in names(images)
    settle(images)
    names(images)
    count = times_listed(caplog)
    names(images)
    assert times_listed(caplog) == count


def test_a_changed_shard_is_noticed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tmp_path / "shards"
    root.mkdir()

    def write(count: int) -> None:
        with tarfile.open(root / "a.tar", "w") as tar:
            for i in range(count):
                tar.addfile(tarfile.TarInfo(f"{i}.jpg"))
        settle(root)

    write(2)
    assert names(root) == names(root) == ["a.tar/0.jpg", "a.tar/1.jpg"]
    assert times_listed(caplog) == 1
    write(3)
    assert len(names(root)) == 3
    (root / "a.idx").write_text("not one, but it might be")
    names(root)
    assert times_listed(caplog) == 3


def test_a_missing_shard_that_comes_is_noticed(tmp_path: Path) -> None:
    def write(name: str) -> None:
        with tarfile.open(tmp_path / name, "w") as tar:
            tar.addfile(tarfile.TarInfo("1.jpg"))
        settle(tmp_path)

    write("s0.tar")
    assert len(names(tmp_path / "s{0..1}.tar")) == 1
    write("s1.tar")
    assert len(names(tmp_path / "s{0..1}.tar")) == 2


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "name": lambda folder: flip(folder / "names.npy", -1),
    "label": lambda folder: flip(folder / "labels.npy", -8),
    "numpy's header": lambda folder: flip(folder / "names.npy", 20),
    "numpy's magic": lambda folder: flip(folder / "names.npy", 0),
    "cut": lambda folder: os.truncate(folder / "name_ends.npy", 140),
    "empty": lambda folder: os.truncate(folder / "name_ends.npy", 0),
    "missing": lambda folder: (folder / "names.npy").unlink(),
    "json": lambda folder: flip(folder / "index.json", 0),
    "json's content": lambda folder: (folder / "index.json").write_text(
        (folder / "index.json").read_text().replace('["a", "b"]', '["a", "c"]')
    ),
    "json of another kind": lambda folder: (folder / "index.json").write_text("[]"),
    "json missing": lambda folder: (folder / "index.json").unlink(),
}


@pytest.mark.parametrize(("kind", "damage"), DAMAGES.items())
def test_a_damaged_index_is_made_anew(
    images: Path, own_cache: Path, kind: str, damage: Callable[[Path], object], caplog: pytest.LogCaptureFixture
) -> None:
    expected = names(images)
    (folder,) = (own_cache / "index").iterdir()
    damage(folder)
    assert names(images) == expected
    assert times_listed(caplog) == 2
    assert ("the data set is listed anew" in caplog.text) == ("missing" not in kind)
    assert names(images) == expected
    assert times_listed(caplog) == 2


def test_an_index_of_another_format_is_made_anew(
    images: Path, own_cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names(images)
    (file,) = (own_cache / "index").glob("*/index.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 0}))
    names(images)
    assert times_listed(caplog) == 2
    assert "listed anew" not in caplog.text


def test_a_run_keeps_the_list_that_it_has_open(images: Path) -> None:
    names(images)
    before = open_dataset(DataConfig(source=str(images)), "train")
    assert before is not None
    for name in ("4.png", "5.png"):
        (images / name).touch()
        settle(images)
        names(images)
    assert list(before.names) == [b"a/1.png", b"b/2.png", b"b/deep/er/3.png"]


def test_a_cache_that_cannot_be_written_is_a_warning(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FASTJEPA_CACHE", str(tmp_path / "file" / "cache"))  # root too cannot create this
    assert len(names(images)) == len(names(images)) == 3
    assert times_listed(caplog) == 2
    assert "the list of images is not cached in" in caplog.text
    assert "set FASTJEPA_CACHE" in caplog.text


def test_an_interrupted_write_leaves_nothing(images: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert len(names(images)) == 3
    assert list((own_cache / "index").iterdir()) == []


@pytest.mark.processes
def test_processes_that_list_at_the_same_time_leave_one_index(images: Path, own_cache: Path) -> None:
    code = (
        "import sys; from fastjepa.config import DataConfig; from fastjepa.data.sources import open_dataset; "
        "print(open_dataset(DataConfig(source=sys.argv[1]), 'train').fingerprint)"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, str(images)]
    racers = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    prints = {racer.communicate(timeout=300)[0].strip() for racer in racers}
    dataset = open_dataset(DataConfig(source=str(images)), "train")
    assert dataset is not None
    assert prints == {dataset.fingerprint}
    kept = [path.name for path in (own_cache / "index").iterdir() if not path.name.endswith(".previous")]
    assert len(kept) == 1


def test_losing_the_race_for_the_final_name_is_no_error(
    images: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process puts its index in place while this one writes its own."""
    expected = names(images)
    (folder,) = (own_cache / "index").iterdir()
    monkeypatch.setattr(index_module, "_load", lambda folder: None)
    monkeypatch.setattr(Path, "rename", lambda self, target: (_ for _ in ()).throw(OSError(39, "Directory not empty")))
    assert names(images) == expected
    assert [path.name for path in (own_cache / "index").iterdir()] == [folder.name]


def test_other_users_may_read_a_shared_cache(images: Path, own_cache: Path) -> None:
    names(images)
    (folder,) = (own_cache / "index").iterdir()
    mask = os.umask(0)
    os.umask(mask)
    assert folder.stat().st_mode & 0o777 == 0o777 & ~mask


def test_a_cached_list_is_not_made_again_by_a_walk(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = names(images)
    monkeypatch.setattr(folder_module._Walk, "names", lambda self, prefix: pytest.fail("walked again"))
    assert names(images) == expected


def test_a_list_made_during_a_read_error_is_not_cached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One read error while the shards are listed must not make the data set smaller for good."""
    for shard in "ab":
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            tar.addfile(tarfile.TarInfo(f"{shard}.jpg"))
    pread, failing = os.pread, [True]

    def fail(descriptor: int, size: int, offset: int) -> bytes:
        if failing.pop() if failing else False:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return pread(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", fail)
    assert len(names(tmp_path)) == 1
    assert any("Input/output error" in message for message in caplog.messages)
    assert len(names(tmp_path)) == 2
    assert times_listed(caplog) == 2


def test_a_link_that_leads_nowhere_is_looked_at_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tmp_path / "images"
    root.mkdir()
    (root / "1.png").touch()
    (root / "2.png").symlink_to(tmp_path / "elsewhere" / "2.png")
    os.utime(root, (time.time() - HOUR,) * 2)
    assert names(root) == names(root) == ["1.png"]
    assert times_listed(caplog) == 1
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "2.png").touch()
    assert names(root) == ["1.png", "2.png"]
