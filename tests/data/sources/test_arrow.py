"""Columns of Arrow and Parquet files: the choice of them, and what is read from them."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from fastjepa.data.image_errors import BadImage
from fastjepa.errors import DataError
from tests.support.tables import ANY_FORMAT, IMAGES, Write, content, images, listed, table, write_parquet, write_stream


@ANY_FORMAT
@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_images_may_be_plain_bytes(tmp_path: Path, name: str, write: Write, kind: Any) -> None:
    written = write(tmp_path / name, table({"id": list(range(10)), "img": IMAGES}, {"img": kind}))
    assert content(listed(written).dataset) == IMAGES


def test_the_column_that_the_metadata_calls_an_image_is_taken(tmp_path: Path) -> None:
    features = {"scan": {"_type": "Image"}, "image": {"_type": "Value"}, "list": [{"_type": "Value"}]}
    made = table({"image": images([b"x"] * 10), "scan": IMAGES}, features=features)
    assert content(listed(write_stream(tmp_path / "a.arrow", made)).dataset) == IMAGES


@pytest.mark.parametrize("columns", [{"image": images(), "mask": [b"x"] * 10}, {"only": IMAGES, "text": ["x"] * 10}])
def test_without_metadata_the_image_column_is_known_by_name_or_is_the_only_one(
    tmp_path: Path, columns: dict[str, list[object]]
) -> None:
    assert content(listed(write_stream(tmp_path / "a.arrow", table(columns))).dataset) == IMAGES


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": ["x"], "n": [1]}, "no image column among text: string, n: int64; expected one of encoded images"),
        ({"one": [b"x"], "two": [b"x"]}, "several image columns among one: binary, two: binary; expected one"),
    ],
)
@pytest.mark.parametrize(("name", "write"), [("a.arrow", write_stream), ("a.parquet", write_parquet)])
def test_no_image_column_or_several_are_refused_with_the_columns(
    tmp_path: Path, columns: dict[str, list[object]], message: str, name: str, write: Write
) -> None:
    with pytest.raises(DataError, match=f"{name}: {message}"):
        listed(write(tmp_path / name, table(columns)))


@ANY_FORMAT
def test_a_class_label_gives_its_names_in_their_order(tmp_path: Path, name: str, write: Write) -> None:
    features = {"image": {"_type": "Image"}, "kind": {"_type": "ClassLabel", "names": ["zebra", "ant", "none"]}}
    made = table({"kind": [1, 0, 1, 1, 0, 0, 0, 1, 1, 1], "image": images()}, features=features)
    dataset = listed(write(tmp_path / name, made)).dataset
    assert dataset.class_names == ("zebra", "ant", "none")
    assert dataset.labels is not None
    assert dataset.labels.tolist() == [1, 0, 1, 1, 0, 0, 0, 1, 1, 1]


@ANY_FORMAT
@pytest.mark.parametrize(
    ("column", "values", "kind", "expected"),
    [
        ("label", [10, 9] * 5, pa.int32(), ("9", "10")),
        ("cls", ["b", "a"] * 5, pa.string(), ("a", "b")),
        ("fine_label", ["b", "a"] * 5, pa.dictionary(pa.int8(), pa.string()), ("a", "b")),
    ],
)
def test_integers_and_texts_of_a_label_column_are_sorted(
    tmp_path: Path, name: str, write: Write, column: str, values: list[object], kind: Any, expected: tuple[str, ...]
) -> None:
    dataset = listed(write(tmp_path / name, table({"image": images(), column: values}, {column: kind}))).dataset
    assert dataset.class_names == expected
    assert dataset.labels is not None
    assert dataset.labels.tolist() == [1, 0] * 5


def test_a_sliced_table_gives_its_own_rows(tmp_path: Path) -> None:
    made = table({"image": images([b"x", *IMAGES, b"y"])}).slice(1, 10)
    assert content(listed(write_stream(tmp_path / "a.arrow", made)).dataset) == IMAGES
    assert content(listed(write_parquet(tmp_path / "a.parquet", made)).dataset) == IMAGES


def test_damaged_arrow_files_raise_no_error_but_ours(tmp_path: Path) -> None:
    made = table({"image": images(), "label": ["a", "b"] * 5})
    whole = np.frombuffer(write_stream(tmp_path / "a.arrow", made).read_bytes(), np.uint8)
    rng = np.random.default_rng(0)
    for _ in range(300):
        damaged = whole.copy()
        damaged[rng.integers(0, len(whole), 4)] = rng.integers(0, 256, 4)
        (tmp_path / "a.arrow").write_bytes(damaged.tobytes())
        try:
            dataset = listed(tmp_path / "a.arrow").dataset
        except DataError:
            continue
        for i in range(len(dataset)):
            try:
                assert len(dataset.read(i, 1 << 20)) <= len(whole)
            except BadImage:
                continue
