"""Images, labels and paths in Arrow and Parquet files. Only this file calls pyarrow, and imports it where it is used."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastjepa.data.dataset import Ints
from fastjepa.data.image_errors import reason_of
from fastjepa.errors import DataError

IMAGE_NAMES = ("image", "img", "png", "jpg", "jpeg", "webp", "tif", "tiff", "bmp")
LABEL_NAMES = ("label", "labels", "cls", "class", "fine_label", "target", "category")

_ROWS_AT_ONCE = 64  # from Parquet
_BUFFER = 1 << 20  # bytes


class BrokenTable(Exception):
    """A table cannot be read; the message is the reason."""


@dataclass(frozen=True)
class Columns:
    """The columns of a table that are used."""

    image: str
    bytes: str
    """The field that holds the bytes: `image.bytes`, or `image` itself."""
    path: str | None
    """The field `image.path`, if there is one."""
    label: str | None
    class_names: tuple[str, ...] | None
    """The meaning of the label's numbers, if the table tells it."""


def choose_columns(file: str) -> Columns:
    """Choose the columns of images and labels.

    The image column is the one that Hugging Face's metadata calls an image; else the one with a name of IMAGE_NAMES; else
    the only one that holds bytes, or a struct of bytes and path. The label column is the one that the metadata calls a
    ClassLabel; else one of integers or texts with a name of LABEL_NAMES.

    Raises:
        BrokenTable: the file cannot be read.
        DataError: there is no image column, or there are several; the message lists the columns.
    """
    schema = _schema(file)
    features = _features(schema)
    with_bytes = [field.name for field in schema if _is_bytes(field.type) or _has_bytes(field.type)]
    images = [name for name in with_bytes if features.get(name, {}).get("_type") == "Image"] or with_bytes
    image = _first_of(IMAGE_NAMES, images) or (images[0] if len(images) == 1 else None)
    if image is None:
        listed = ", ".join(f"{field.name}: {field.type}" for field in schema)
        raise DataError(
            f"{file}: {'several image columns' if images else 'no image column'} among {listed}; expected one of encoded "
            f"images (a struct of bytes and path, or binary), or one of several that is named {', '.join(IMAGE_NAMES)}"
        )
    kind = schema.field(image).type
    inner = None if _is_bytes(kind) else [field.name for field in kind]
    named = [name for name in schema.names if isinstance(features.get(name, {}).get("names"), list)]
    plain = [field.name for field in schema if _is_label(field.type)]
    label = _first_of(LABEL_NAMES, named) or (named[0] if len(named) == 1 else None) or _first_of(LABEL_NAMES, plain)
    return Columns(
        image,
        f"{image}.bytes" if inner else image,
        f"{image}.path" if inner and "path" in inner else None,
        label,
        tuple(map(str, features[label]["names"])) if label and label in named else None,
    )


def spans_in_place(file: str, columns: Columns) -> Ints | None:
    """Start and size of every row's image in the file, int64 [n, 2]; None if the images are compressed there.

    Size -1 stands for a row without bytes.

    Raises:
        BrokenTable: the file cannot be read.
    """
    if file.endswith(".parquet"):
        return None
    found = [np.empty((0, 2), np.int64)]
    with _broken_if_unreadable():
        for batch, start, end in _arrow_batches(file, [columns.image]):
            data, spans = _buffer_and_spans(batch.column(columns.image))
            if data is not None and data.size:
                if not start <= data.address <= data.address + data.size <= end:
                    return None
                spans[:, 0] += data.address - start
            found.append(spans)
    return np.concatenate(found)


def encoded_images(file: str, columns: Columns) -> Iterator[tuple[memoryview, Ints]]:
    """All images, some rows at a time: their bytes, one image behind the other, and their spans in these bytes, as in
    `spans_in_place`.

    Raises:
        BrokenTable: the file cannot be read.
    """
    with _broken_if_unreadable():
        for batch in _batches(file, [columns.bytes]):
            data, spans = _buffer_and_spans(batch.column(columns.image))
            first = int(spans[0, 0]) if len(spans) else 0
            last = int(spans.sum(1).max(initial=first))
            spans[:, 0] -= first
            yield memoryview(data)[first:last] if data is not None else memoryview(b""), spans


def size_unpacked(file: str) -> int:
    """Bytes, about, that `encoded_images` gives.

    Raises:
        BrokenTable: the file cannot be read.
    """
    import pyarrow.parquet as parquet

    with _broken_if_unreadable():
        if not file.endswith(".parquet"):
            return os.path.getsize(file)  # noqa: PTH202 (a name need not be UTF-8)
        metadata = parquet.read_metadata(file)
        # Count all columns: the others are small, and pyarrow aborts the process on some that are damaged.
        return sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))


def read_labels(file: str, columns: Columns) -> tuple[Ints, tuple[str, ...]]:
    """Read the label column.

    Returns:
        Every row's label, int64 [n], an index into the values, or -1 for none; and the values.

    Raises:
        BrokenTable: the file cannot be read.
    """
    assert columns.label is not None
    found, number = [np.empty(0, np.int64)], dict[object, int]()
    with _broken_if_unreadable():
        for batch in _batches(file, [columns.label]):
            column = batch.column(0)
            if columns.class_names is not None:
                numbers = _integers(column)
                found.append(np.where((numbers >= 0) & (numbers < len(columns.class_names)), numbers, -1))
            else:
                column = column if hasattr(column, "dictionary") else column.dictionary_encode()
                values = column.dictionary.to_pylist()
                here = [-1 if value is None else number.setdefault(value, len(number)) for value in values]
                found.append(np.array([*here, -1], np.int64)[_integers(column.indices)])
    return np.concatenate(found), columns.class_names or tuple(map(str, number))


def read_paths(file: str, columns: Columns) -> Iterator[str | None]:
    """Every row's path.

    Raises:
        BrokenTable: the file cannot be read.
    """
    assert columns.path is not None
    with _broken_if_unreadable():
        for batch in _batches(file, [columns.path]):
            yield from batch.column(0).field("path").to_pylist()


def _batches(file: str, columns: list[str]) -> Iterator[Any]:
    """Record batches of some columns. For `image.bytes`, Parquet reads nothing else of the struct."""
    import pyarrow.parquet as parquet

    with _broken_if_unreadable():
        if file.endswith(".parquet"):
            # Read page by page (pyarrow writes pages of 1024 rows), not a row group's whole column at once.
            with parquet.ParquetFile(file, buffer_size=_BUFFER, pre_buffer=False) as table:
                yield from table.iter_batches(_ROWS_AT_ONCE, columns=columns)
        else:
            for batch, *_ in _arrow_batches(file, columns):
                yield batch


def _arrow_batches(file: str, columns: list[str]) -> Iterator[tuple[Any, int, int]]:
    """Record batches of some columns of an Arrow file (a stream, or with a footer), and the addresses in memory at which the
    file's mapping begins and ends."""
    import pyarrow as pa

    def checked(batch: Any) -> Any:
        part = batch.select([column.partition(".")[0] for column in columns])
        part.validate(full=True)  # without this, a damaged file would bring the process down
        return part

    with pa.memory_map(file) as mapped:
        whole = mapped.read_buffer()
        start, end = whole.address, whole.address + whole.size
        if whole[:6].to_pybytes() == b"ARROW1":
            reader = pa.ipc.open_file(pa.BufferReader(whole))
            for number in range(reader.num_record_batches):
                yield checked(reader.get_batch(number)), start, end
        else:
            for batch in pa.ipc.open_stream(pa.BufferReader(whole)):
                yield checked(batch), start, end


def _schema(file: str) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    with _broken_if_unreadable():
        if file.endswith(".parquet"):
            schema = parquet.read_schema(file)
        else:
            with pa.memory_map(file) as mapped:
                footed = mapped.read(6) == b"ARROW1"
                mapped.seek(0)
                schema = (pa.ipc.open_file if footed else pa.ipc.open_stream)(mapped).schema
        for field in schema:  # decode the names here, where errors are caught
            _ = field.name, [inner.name for inner in field.type] if pa.types.is_struct(field.type) else ()
        return schema


@contextlib.contextmanager
def _broken_if_unreadable() -> Iterator[None]:
    """Turn the errors of reading a table into BrokenTable."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, EOFError, ValueError, LookupError) as error:  # names may not be UTF-8
        raise BrokenTable(reason_of(error)) from error


def _buffer_and_spans(column: Any) -> tuple[Any, Ints]:
    """The buffer that holds the bytes of a column of images (None if there are none), and each row's span in it, int64
    [n, 2]."""
    import pyarrow as pa

    missing = _booleans(column.is_null())
    if pa.types.is_struct(column.type):
        column = column.field("bytes")
        missing |= _booleans(column.is_null())
    if not (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)):
        column = column.cast(pa.large_binary())
    _, offsets, data = column.buffers()
    if not len(column):
        return None, np.empty((0, 2), np.int64)
    wide = pa.types.is_large_binary(column.type)
    ends = np.frombuffer(offsets, np.int64 if wide else np.int32)[column.offset : column.offset + len(column) + 1]
    spans = np.stack([ends[:-1], np.diff(ends)], 1).astype(np.int64)
    if ends[0] < 0 or spans[:, 1].min() < 0 or ends[-1] > (data.size if data is not None else 0):
        raise pa.ArrowInvalid("offsets of images lie outside of their buffer")
    spans[missing, 1] = -1
    return data, spans


def _integers(column: Any) -> Ints:
    """An integer column, int64 [n]; -1 for null."""
    import pyarrow as pa

    return np.asarray(column.cast(pa.int64()).fill_null(-1).to_numpy(zero_copy_only=False), np.int64)


def _booleans(column: Any) -> np.ndarray[Any, np.dtype[np.bool_]]:
    return np.array(column.to_numpy(zero_copy_only=False), bool)


def _features(schema: Any) -> dict[str, dict[str, Any]]:
    """The description of the columns that `datasets` keeps in the metadata; empty if there is none."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


def _first_of(names: tuple[str, ...], columns: list[str]) -> str | None:
    return next((name for name in names if name in columns), None)


def _is_bytes(kind: Any) -> bool:
    import pyarrow.types as types

    return bool(types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind))


def _has_bytes(kind: Any) -> bool:
    import pyarrow.types as types

    return bool(types.is_struct(kind)) and any(field.name == "bytes" and _is_bytes(field.type) for field in kind)


def _is_label(kind: Any) -> bool:
    import pyarrow.types as types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    return bool(
        types.is_integer(kind) or types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    )
