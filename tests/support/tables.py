"""Writes Arrow and Parquet files for tests."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastjepa.data.dataset import ImageDataset
from fastjepa.data.sources.index import Listing
from fastjepa.data.sources.tables import list_tables

IMAGES = [bytes([65 + i]) * (100 * i + 1) for i in range(10)]


STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


Write = Callable[[Path, Any], Path]


def write_stream(path: Path, table: Any) -> Path:
    """Write an Arrow stream in several batches, as `datasets` does."""
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
    """Make a table. A column named image becomes a struct of bytes and path; `features` are metadata of `datasets`."""
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
