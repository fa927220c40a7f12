"""The list of images of a data set: its strings, its labels, and how bytes are read."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastjepa.data.dataset import ImageDataset, Spans, Strings
from fastjepa.data.decode.images import read_header
from fastjepa.data.image_errors import BadImage


def file_dataset(path: Path) -> ImageDataset:
    return ImageDataset(str(path.parent), Strings.of([os.fsencode(path.name)]), None, ())


def test_a_file_that_cannot_be_read_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(BadImage, match=r"^No such file or directory$"):
        file_dataset(tmp_path / "missing.jpg").read(0, 100)
    (tmp_path / "empty.jpg").touch()
    with pytest.raises(BadImage, match=r"^empty file$"):
        file_dataset(tmp_path / "empty.jpg").read(0, 100)
    (tmp_path / "huge.jpg").write_bytes(b"x" * 101)
    with pytest.raises(BadImage, match=r"^101 bytes, expected at most 100"):
        file_dataset(tmp_path / "huge.jpg").read(0, 100)
    os.mkfifo(tmp_path / "pipe.jpg")
    for no_file in (tmp_path, tmp_path / "pipe.jpg"):
        with pytest.raises(BadImage, match=r"^not a regular file$"):
            file_dataset(no_file).read(0, 10**9)


def test_reads_are_tried_again_after_errors_that_may_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network file system fails twice, and then for good; and its reads give less than was asked for."""
    (tmp_path / "x.jpg").write_bytes(b"0123456789")
    monkeypatch.setattr("fastjepa.data.dataset._PAUSE", 0)
    pread, failures = os.pread, [errno.EIO, errno.ESTALE]

    def fail(descriptor: int, size: int, offset: int) -> bytes:
        if failures:
            number = failures.pop()
            raise OSError(number, os.strerror(number))
        return pread(descriptor, min(size, 3), offset)

    monkeypatch.setattr(os, "pread", fail)
    assert file_dataset(tmp_path / "x.jpg").read(0, 100) == b"0123456789"
    failures += [errno.EIO] * 3
    with pytest.raises(BadImage, match="Input/output error"):
        file_dataset(tmp_path / "x.jpg").read(0, 100)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads every file")
def test_an_unreadable_file_is_refused_with_the_reason(tmp_path: Path) -> None:
    Image.new("L", (4, 4)).save(tmp_path / "x.png")
    (tmp_path / "x.png").chmod(0)
    with pytest.raises(BadImage, match=r"^Permission denied$"):
        file_dataset(tmp_path / "x.png").read(0, 100)


def test_names_that_are_not_utf8_are_read_and_can_be_printed(
    tmp_path: Path, write_invalid_name: Callable[[Path, bytes], bytes]
) -> None:
    Image.new("L", (8, 8), 102).save(tmp_path / "x.png")
    written = write_invalid_name(tmp_path / "x.png", b"\xff\xfe \xe9.png")
    dataset = ImageDataset(str(tmp_path), Strings.of([written.rpartition(b"/")[2]]), None, ())
    assert read_header(dataset.read(0, 1000), 100).height == 8
    assert dataset.name(0) == "\\xff\\xfe \\xe9.png"


def test_a_span_of_a_file_is_read_and_nothing_around_it(tmp_path: Path) -> None:
    (tmp_path / "shard").write_bytes(b"0123456789")
    (tmp_path / "alone").write_bytes(b"whole")
    spans = Spans(
        Strings.of([b"shard", b"alone"]),
        np.array([0, 0, -1, 1, 0], np.int32),
        np.array([2, 9, 0, 0, 8]),
        np.array([3, 1, -1, -1, 3]),
    )
    names = Strings.of([b"shard/a", b"shard/b", b"alone", b"alone#2", b"shard/c"])
    dataset = ImageDataset(str(tmp_path), names, None, (), spans)
    assert [dataset.read(i, 99) for i in range(4)] == [b"234", b"9", b"whole", b"whole"]
    with pytest.raises(BadImage, match=r"^the file ends after 2 of its 3 bytes$"):
        dataset.read(4, 99)


def test_labels_by_the_classes_of_another_set_number_unknown_classes_last() -> None:
    names = Strings.of([b"1", b"2", b"3", b"4"])
    dataset = ImageDataset(".", names, np.array([0, 1, 2, 0]), ("ant", "bee", "cat"))
    labels = dataset.labels_by(("cat", "dog", "ant"))
    assert labels is not None
    assert labels.tolist() == [2, 3, 0, 2]  # bee comes behind the three known classes
    assert ImageDataset(".", names, None, ()).labels_by(("cat",)) is None


def test_the_fingerprint_is_that_of_the_names_in_their_order() -> None:
    one, same, swapped = (
        ImageDataset("x", Strings.of(names), None, ()) for names in ([b"a", b"b"], [b"a", b"b"], [b"b", b"a"])
    )
    assert one.fingerprint == same.fingerprint != swapped.fingerprint


def test_strings_give_back_what_was_put_in() -> None:
    for strings in ([], [b""], [b"a"], [b"", b""], [b"a", b"", b"bc", b"\xff\n"], [b"x" * i for i in range(300)]):
        made = Strings.of(iter(strings))
        assert len(made) == len(strings)
        assert list(made) == [made[i] for i in range(len(made))] == strings
    with pytest.raises(ValueError, match="holds a NUL"):
        Strings.of([b"a\0b"])


def test_strings_can_be_more_than_are_handled_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastjepa.data.dataset._STRINGS_AT_ONCE", 3)
    for count in range(10):
        strings = [b"%d" % i for i in range(count)]
        assert list(Strings.of(strings)) == strings
