"""Text files that list images: the lines that count, their labels, and errors."""

import os
from pathlib import Path

import pytest

from fastjepa.data.dataset import ImageDataset
from fastjepa.data.image_errors import BadImage
from fastjepa.data.sources.list_file import read_list_file
from fastjepa.errors import DataError


def listed(folder: Path, text: bytes) -> ImageDataset:
    (folder / "list.txt").write_bytes(text)
    listing = read_list_file([str(folder / "list.txt")])
    assert listing.watched == [os.fsencode(folder / "list.txt")]
    return listing.dataset


def test_paths_are_relative_to_the_list_or_absolute_in_its_order(tmp_path: Path) -> None:
    (tmp_path / "far").write_bytes(b"far")
    (tmp_path / "near" / "b").mkdir(parents=True)
    (tmp_path / "near" / "b" / "2.jpg").write_bytes(b"2")
    dataset = listed(tmp_path / "near", b"b/2.jpg\n%s\n../far\n" % os.fsencode(tmp_path / "far"))
    assert list(dataset.names) == [b"b/2.jpg", os.fsencode(tmp_path / "far"), b"../far"]
    assert [dataset.read(i, 9) for i in range(3)] == [b"2", b"far", b"far"]
    assert dataset.labels is None


def test_comments_blank_lines_and_line_ends_of_windows_are_passed_over(tmp_path: Path) -> None:
    dataset = listed(tmp_path, b"\xef\xbb\xbf# a comment\r\n\r\na b,c.jpg\r\n  \n#x.jpg\n./#x.jpg")
    assert list(dataset.names) == [b"a b,c.jpg", b"./#x.jpg"]


def test_names_need_not_be_utf8(tmp_path: Path) -> None:
    dataset = listed(tmp_path, b"\xff\xfe.jpg\tgrau\xdf\n" + "雪.jpg\tschön\n".encode())
    assert dataset.name(0) == r"\xff\xfe.jpg"
    assert dataset.class_names == ("grau\\xdf", "schön")


def test_labels_that_are_integers_are_sorted_by_number(tmp_path: Path) -> None:
    dataset = listed(tmp_path, b"a.jpg\t10\nb.jpg\t9\nc.jpg\t-1\nd.jpg\t009 \n")
    assert dataset.class_names == ("-1", "9", "10")
    assert dataset.labels is not None
    assert dataset.labels.tolist() == [2, 1, 0, 1]


def test_labels_that_are_texts_are_sorted(tmp_path: Path) -> None:
    dataset = listed(tmp_path, b"a.jpg\tred fox\nb.jpg\t9\nc.jpg\t10\n")
    assert dataset.class_names == ("10", "9", "red fox")
    assert dataset.labels is not None
    assert dataset.labels.tolist() == [2, 1, 0]


def test_a_path_that_is_listed_again_is_a_sample_of_its_own(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.jpg", "a.jpg#2"):
        (tmp_path / name).write_bytes(name.encode())
    dataset = listed(tmp_path, b"a.jpg\t1\nb.jpg\t1\na.jpg\t2\na.jpg#2\t1\na.jpg\t1\nb.jpg\t1\n")
    assert list(dataset.names) == [b"a.jpg", b"b.jpg", b"a.jpg#3", b"a.jpg#2", b"a.jpg#4", b"b.jpg#2"]
    content = [dataset.read(i, 99) for i in range(6)]
    assert content == [b"a.jpg", b"b.jpg", b"a.jpg", b"a.jpg#2", b"a.jpg", b"b.jpg"]
    assert dataset.labels is not None
    assert dataset.labels.tolist() == [0, 0, 1, 0, 0, 0]


def test_a_listed_file_that_is_missing_is_a_bad_image(tmp_path: Path) -> None:
    dataset = listed(tmp_path, b"gone.jpg\n")
    with pytest.raises(BadImage, match="No such file or directory"):
        dataset.read(0, 99)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"a.jpg\t1\n\nb.jpg\n", "line 3: has no label, but line 1 has one"),
        (b"#\na.jpg\nb.jpg\nc.jpg\t1\n", "line 4: has a label, but line 2 has none"),
        (b"a.jpg 3\nb.jpg 4\n", r"line 1: no tab between path and label in b'a.jpg 3"),
        (b"a.jpg, cat\n", "line 1: no tab between path and label"),
        (b"a.jpg\t1\tx\n", "line 1: .*a label behind a tab"),
        (b"a.jpg\n\tcat\n", "line 2: .*one image path a line"),
        (b"a.jpg\n" * 20_000 + b"b\0.jpg\n", r"line 20001: b'b\\x00"),
        (b"\n# nothing\n", "lists nothing; expected a text file with one image path a line"),
        (b"", "lists nothing"),
        (
            b"\xff\xd8\xff\xe0\0\x10JFIF\0",
            "holds NUL bytes, so it is no text .*expected a text file with one image path",
        ),
        ("a.jpg\n".encode("utf-16"), "holds NUL bytes, so it is no text"),
    ],
)
def test_a_malformed_list_is_refused_with_the_line(tmp_path: Path, text: bytes, message: str) -> None:
    with pytest.raises(DataError, match=rf"list\.txt.*{message}"):
        listed(tmp_path, text)


def test_a_list_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"list\.txt: cannot be read \(No such file or directory\)"):
        read_list_file([str(tmp_path / "list.txt")])
