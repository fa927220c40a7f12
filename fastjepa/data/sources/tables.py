"""Hugging Face data sets on disk: Arrow files are read in place, Parquet files are unpacked once.

`datasets` writes Arrow files with `save_to_disk` and into its cache: record batches without compression, in which an image
is a span of the file. In Parquet files and in compressed Arrow files it is not; see `unpacked`. pyarrow is needed only to
list the rows.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np

from fastjepa.data.dataset import Ints, Strings
from fastjepa.data.sources import arrow
from fastjepa.data.sources.file_samples import FileSamples, common_folder, join
from fastjepa.data.sources.index import Listing
from fastjepa.data.sources.unpacked import UnpackedImages, require_space
from fastjepa.errors import DataError

logger = logging.getLogger(__name__)


def list_tables(files: list[str]) -> Listing:
    """The rows of Arrow or Parquet files, in the order of the files. A row is named after its file and its number there.

    `arrow.choose_columns` chooses the columns of images and labels. A row without bytes but with a path stands for that file
    (relative to the common folder of the tables, if it is not absolute). A row with neither stays, as an image that cannot
    be read, so that the other rows keep their numbers. Labels are used if all rows have one. A broken table is left out,
    with a warning.

    Raises:
        DataError: no table can be read; a table has no image column, or several; pyarrow is missing; or the images have to
            be unpacked and there is no room for them.
    """
    if find_spec("pyarrow") is None:
        raise DataError("Arrow and Parquet files need pyarrow: pip install 'fastjepa[tables]'")
    root = common_folder(files)
    warnings: list[str] = []
    complete = True  # False after an OSError, which may pass
    tables: list[_Table] = []
    for file in files:
        try:
            tables.append(_open(file))
        except arrow.BrokenTable as error:
            complete &= not isinstance(error.__cause__, OSError)
            warnings.append(f"{file} is left out: {error}")
    if to_unpack := [table for table in tables if table.spans is None]:
        require_space(sum(table.size_unpacked for table in to_unpack), f"{len(to_unpack)} tables")
    parts: list[FileSamples] = []
    for table in tables:
        try:
            parts.append(_samples_of(root, table))
        except arrow.BrokenTable as error:
            complete &= not isinstance(error.__cause__, OSError)
            warnings.append(f"{table.file} is left out: {error}")
    rows = sum(len(part.names) for part in parts)
    if not rows:
        raise DataError("; ".join(["no rows in the tables", *warnings]))
    if bad := sum(int(np.count_nonzero(part.size == 0)) for part in parts):
        warnings.append(f"{root}: {bad} of {rows} rows hold neither bytes nor a path: these are bad images")
    watched = files + [str(table.unpacked.images) for table in tables if table.unpacked]
    listing = join(root, parts, [os.fsencode(path) for path in watched], warnings)
    listing.complete = complete
    return listing


@dataclass(frozen=True)
class _Table:
    file: str
    columns: arrow.Columns
    spans: Ints | None
    """int64 [n, 2], see `arrow.spans_in_place`; None: the images are still to be unpacked."""
    unpacked: UnpackedImages | None = None
    """None: the images are read in place."""
    size_unpacked: int = 0
    """Bytes, about, that unpacking takes."""


def _open(file: str) -> _Table:
    columns = arrow.choose_columns(file)
    spans = arrow.spans_in_place(file, columns)
    if spans is not None:
        return _Table(file, columns, spans)
    unpacked = UnpackedImages(file, columns.bytes)
    return _Table(file, columns, unpacked.spans(), unpacked, arrow.size_unpacked(file))


def _samples_of(root: str, table: _Table) -> FileSamples:
    file, columns, spans = table.file, table.columns, table.spans
    source = os.path.relpath(file, root)
    if spans is None:
        assert table.unpacked is not None
        logger.info("%s: unpacking %.2f GB of images", file, table.size_unpacked / 1e9)
        spans = table.unpacked.write(lambda: arrow.encoded_images(file, columns))
    files = {os.fsencode(str(table.unpacked.images) if table.unpacked else source): 0}
    place = np.zeros(len(spans), np.int64)
    start, size = spans.T
    without = size < 0
    if without.any():
        size = np.where(without, 0, size)
        paths = arrow.read_paths(file, columns) if columns.path else ()
        for row, (path, wanted) in enumerate(zip(paths, without.tolist(), strict=False)):
            if wanted and path and "\0" not in path:
                place[row] = files.setdefault(os.fsencode(path), len(files))
                start[row], size[row] = 0, -1
    labels, values = arrow.read_labels(file, columns) if columns.label else (np.full(len(spans), -1), ())
    return FileSamples(
        names=Strings.of(os.fsencode(f"{source}/{row:06d}") for row in range(len(spans))),
        files=list(files),
        file=place,
        start=start,
        size=size,
        labels=labels,
        values=values,
        in_order=columns.class_names is not None,
    )
