"""Arrow and Parquet files as a source: their rows in order, and what happens to broken ones."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from fastjepa.data.image_errors import BadImage
from fastjepa.errors import DataError
from tests.support.tables import (
    ANY_FORMAT,
    IMAGES,
    Write,
    content,
    images,
    listed,
    table,
    unpacked,
    write_compressed,
    write_file,
    write_parquet,
    write_stream,
)


@ANY_FORMAT
def test_images_are_read_from_every_format(tmp_path: Path, own_cache: Path, name: str, write: Write) -> None:
    listing = listed(write(tmp_path / name, table({"image": images()})))
    assert content(listing.dataset) == IMAGES
    assert list(listing.dataset.names) == [f"{name}/{row:06d}".encode() for row in range(10)]
    assert listing.dataset.labels is None
    assert listing.warnings == []
    in_place = name in ("stream.arrow", "file.arrow")
    assert len(unpacked(own_cache)) == (0 if in_place else 1)
    assert listing.watched == [os.fsencode(path) for path in (tmp_path / name, *unpacked(own_cache))]


def test_tables_follow_one_another_with_names_below_their_common_folder(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    b = write_parquet(tmp_path / "deep" / "b.parquet", table({"image": images(IMAGES[:2])}))
    a = write_stream(tmp_path / "a.arrow", table({"image": images(IMAGES[2:])}))
    dataset = listed(b, a).dataset
    assert content(dataset) == IMAGES
    assert dataset.name(1) == "deep/b.parquet/000001"
    assert dataset.name(2) == "a.arrow/000000"


def test_class_labels_of_several_tables_are_joined_by_name(tmp_path: Path) -> None:
    def write(name: str, names: list[str]) -> Path:
        features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": names}}
        return write_stream(tmp_path / name, table({"image": images(), "label": [0, 1] * 5}, features=features))

    dataset = listed(write("a.arrow", ["x", "y"]), write("b.arrow", ["y", "z"])).dataset
    assert dataset.class_names == ("x", "y", "z")
    assert dataset.labels is not None
    assert dataset.labels[[0, 1, 10, 11]].tolist() == [0, 1, 1, 2]


def test_labels_that_are_partly_missing_are_not_used(tmp_path: Path) -> None:
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["a", "b"]}}
    made = table({"image": images(), "label": [0, 1, -1, None, 2, 0, 0, 0, 0, 0]}, features=features)
    listing = listed(write_stream(tmp_path / "a.arrow", made))
    assert listing.dataset.labels is None
    assert listing.warnings == [f"{tmp_path}: 3 of 10 samples have no label: no labels are used"]


def test_labels_that_are_all_unknown_are_none(tmp_path: Path) -> None:
    """Test splits on the Hugging Face Hub often have the label -1 in every row."""
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["a", "b"]}}
    made = table({"image": images(), "label": [-1] * 10}, features=features)
    listing = listed(write_stream(tmp_path / "a.arrow", made))
    assert listing.dataset.labels is None
    assert listing.warnings == []


@ANY_FORMAT
def test_a_row_without_bytes_is_the_file_at_its_path(tmp_path: Path, name: str, write: Write) -> None:
    (tmp_path / "near.jpg").write_bytes(b"near")
    (tmp_path / "far.jpg").write_bytes(b"far")
    far = str(tmp_path / "far.jpg")
    rows = [
        {"bytes": b"here", "path": far},
        {"bytes": None, "path": far},
        {"bytes": None, "path": None},
        {"bytes": None, "path": "near.jpg"},
        None,
        {"bytes": b"", "path": None},
        {"bytes": None, "path": far},
        {"bytes": b"there", "path": None},
    ]
    listing = listed(write(tmp_path / name, table({"image": rows})))
    dataset = listing.dataset
    read = {0: b"here", 1: b"far", 3: b"near", 6: b"far", 7: b"there"}
    assert {i: dataset.read(i, 99) for i in read} == read
    assert len(dataset) == len(rows)
    for bad in (2, 4, 5):
        with pytest.raises(BadImage, match="empty file"):
            dataset.read(bad, 99)
    assert listing.warnings == [f"{tmp_path}: 3 of 8 rows hold neither bytes nor a path: these are bad images"]


@ANY_FORMAT
def test_tables_of_paths_only_are_read(tmp_path: Path, name: str, write: Write) -> None:
    for i, data in enumerate(IMAGES):
        (tmp_path / f"{i}.jpg").write_bytes(data)
    rows = [{"bytes": None, "path": str(tmp_path / f"{i}.jpg")} for i in range(10)]
    assert content(listed(write(tmp_path / name, table({"image": rows}))).dataset) == IMAGES


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1500])


def scribble(path: Path) -> None:
    path.write_bytes(b"I am a text that somebody renamed.\n" * 20)


def spoil_page(path: Path) -> None:
    """Damage a page of images in the middle; the footer stays whole."""
    data = bytearray(path.read_bytes())
    data[20:200] = bytes(180)
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "write", "damage"),
    [
        ("bad.arrow", write_stream, cut),
        ("bad.arrow", write_file, cut),
        ("bad.arrow", write_compressed, scribble),
        ("bad.arrow", write_stream, Path.unlink),
        ("bad.arrow", write_stream, lambda path: path.write_bytes(b"")),
        ("bad.parquet", write_parquet, cut),
        ("bad.parquet", write_parquet, scribble),
        ("bad.parquet", write_parquet, spoil_page),
        ("bad.parquet", write_parquet, Path.unlink),
        ("bad.parquet", write_parquet, lambda path: path.write_bytes(b"")),
    ],
)
def test_a_broken_table_is_left_out_with_a_warning(
    tmp_path: Path, own_cache: Path, name: str, write: Write, damage: Callable[[Path], object]
) -> None:
    bad = write(tmp_path / name, table({"image": images()}))
    damage(bad)
    listing = listed(bad, write_stream(tmp_path / "good.arrow", table({"image": images()})))
    assert content(listing.dataset) == IMAGES
    assert len(listing.warnings) == 1
    assert listing.warnings[0].startswith(f"{bad} is left out: ")
    assert os.fsencode(bad) in listing.watched
    with pytest.raises(DataError, match=rf"no rows in the tables; .*{name} is left out: "):
        listed(bad)
    assert unpacked(own_cache) == []
    assert [path.suffix for path in (own_cache / "tables").glob("*")] in ([], [".lock"])


def test_without_pyarrow_the_message_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastjepa.data.sources.tables.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install 'fastjepa\[tables\]'"):
        listed(tmp_path / "a.arrow")
