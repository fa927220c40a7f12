"""Arrow and Parquet files: which columns, where the images lie, and what is done about broken files and full disks."""

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastjepa.data.dataset import ImageDataset
from fastjepa.data.decode.images import BadImage
from fastjepa.data.sources.index import Listing
from fastjepa.data.sources.tables import list_tables
from fastjepa.errors import DataError

IMAGES = [bytes([65 + i]) * (100 * i + 1) for i in range(10)]
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
Write = Callable[[Path, Any], Path]


def write_stream(path: Path, table: Any) -> Path:
    """As `datasets` does, in several batches."""
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=4)
    return path


def write_file(path: Path, table: Any) -> Path:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=4)
    return path


def write_compressed(path: Path, table: Any) -> Path:
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=4)
    return path


def write_parquet(path: Path, table: Any) -> Path:
    pq.write_table(table, path, row_group_size=4)
    return path


WRITERS = {
    "stream.arrow": write_stream,
    "file.arrow": write_file,
    "compressed.arrow": write_compressed,
    "rows.parquet": write_parquet,
}
ANY_FORMAT = pytest.mark.parametrize(("name", "write"), WRITERS.items())


def table(
    columns: Mapping[str, Sequence[object]], types: Mapping[str, Any] | None = None, features: object = None
) -> Any:
    """Columns named image become structs of bytes and path; `features` as `datasets` describes them."""
    types = {"image": STRUCT, **(types or {})}
    made = pa.table({name: pa.array(values, types.get(name)) for name, values in columns.items()})
    info = {"info": {"features": features}}
    return made.replace_schema_metadata({"huggingface": json.dumps(info)}) if features else made


def images(rows: Sequence[bytes | None] = IMAGES) -> list[dict[str, object]]:
    return [{"bytes": row, "path": "same.jpg"} for row in rows]


def listed(*files: Path) -> Listing:
    return list_tables([str(file) for file in files])


def content(dataset: ImageDataset) -> list[bytes]:
    return [dataset.read(i, 1 << 20) for i in range(len(dataset))]


def unpacked(cache: Path) -> list[Path]:
    return sorted((cache / "tables").glob("*/images.bin"))


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


@ANY_FORMAT
@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_images_may_be_plain_bytes(tmp_path: Path, name: str, write: Write, kind: Any) -> None:
    written = write(tmp_path / name, table({"id": list(range(10)), "img": IMAGES}, {"img": kind}))
    assert content(listed(written).dataset) == IMAGES


def test_tables_follow_one_another_with_names_below_their_common_folder(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    b = write_parquet(tmp_path / "deep" / "b.parquet", table({"image": images(IMAGES[:2])}))
    a = write_stream(tmp_path / "a.arrow", table({"image": images(IMAGES[2:])}))
    dataset = listed(b, a).dataset
    assert content(dataset) == IMAGES
    assert dataset.name(1) == "deep/b.parquet/000001"
    assert dataset.name(2) == "a.arrow/000000"


def test_the_column_that_the_metadata_calls_an_image_is_taken(tmp_path: Path) -> None:
    features = {"scan": {"_type": "Image"}, "image": {"_type": "Value"}, "list": [{"_type": "Value"}]}
    made = table({"image": images([b"x"] * 10), "scan": IMAGES}, features=features)
    assert content(listed(write_stream(tmp_path / "a.arrow", made)).dataset) == IMAGES


@pytest.mark.parametrize("columns", [{"image": images(), "mask": [b"x"] * 10}, {"only": IMAGES, "text": ["x"] * 10}])
def test_without_metadata_the_name_counts_or_there_is_one(tmp_path: Path, columns: dict[str, list[object]]) -> None:
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


def test_class_labels_of_several_tables_are_joined_by_name(tmp_path: Path) -> None:
    def write(name: str, names: list[str]) -> Path:
        features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": names}}
        return write_stream(tmp_path / name, table({"image": images(), "label": [0, 1] * 5}, features=features))

    dataset = listed(write("a.arrow", ["x", "y"]), write("b.arrow", ["y", "z"])).dataset
    assert dataset.class_names == ("x", "y", "z")
    assert dataset.labels is not None
    assert dataset.labels[[0, 1, 10, 11]].tolist() == [0, 1, 1, 2]


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


def test_labels_that_are_partly_missing_are_not_used(tmp_path: Path) -> None:
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["a", "b"]}}
    made = table({"image": images(), "label": [0, 1, -1, None, 2, 0, 0, 0, 0, 0]}, features=features)
    listing = listed(write_stream(tmp_path / "a.arrow", made))
    assert listing.dataset.labels is None
    assert listing.warnings == [f"{tmp_path}: 3 of 10 samples have no label: no labels are used"]


def test_labels_that_are_all_unknown_are_none(tmp_path: Path) -> None:
    """A test split of Hugging Face's has -1 for all of them."""
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


def test_a_sliced_table_gives_its_own_rows(tmp_path: Path) -> None:
    made = table({"image": images([b"x", *IMAGES, b"y"])}).slice(1, 10)
    assert content(listed(write_stream(tmp_path / "a.arrow", made)).dataset) == IMAGES
    assert content(listed(write_parquet(tmp_path / "a.parquet", made)).dataset) == IMAGES


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1500])


def scribble(path: Path) -> None:
    path.write_bytes(b"I am a text that somebody renamed.\n" * 20)


def spoil_page(path: Path) -> None:
    """A page of images in the middle; the footer is whole."""
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


def test_damaged_arrow_files_give_images_or_a_message_but_no_other_error(tmp_path: Path) -> None:
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


def test_what_a_killed_process_left_is_removed(tmp_path: Path, own_cache: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet", table({"image": images()}))
    listed(file)
    folder = unpacked(own_cache)[0].parent
    shutil.rmtree(folder)
    (folder.parent / f".{folder.name}-killed").mkdir()
    listed(file)
    assert not list(folder.parent.glob(".*"))


def test_a_disk_that_is_too_small_is_noticed_before(
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


def test_without_pyarrow_the_message_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastjepa.data.sources.tables.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install 'fastjepa\[tables\]'"):
        listed(tmp_path / "a.arrow")
