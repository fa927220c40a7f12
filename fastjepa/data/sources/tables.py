"""Hugging Face data sets on disk: Arrow files, whose images are read in place, and Parquet files, which are unpacked once.

Arrow files are what `datasets` writes with `save_to_disk` and into its cache: record batches without compression, so that an
image is a span of the file. In Parquet files (and in compressed Arrow files) it is not; see `unpacked`. pyarrow is needed to
list them only.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np

from fastjepa.data.dataset import Ints, Strings
from fastjepa.data.sources import arrow
from fastjepa.data.sources.index import Listing
from fastjepa.data.sources.parts import Part, common_folder, join
from fastjepa.data.sources.unpacked import Unpacked, require_space
from fastjepa.errors import DataError

logger = logging.getLogger(__name__)


def list_tables(files: list[str]) -> Listing:
    """The rows of Arrow or Parquet files, in the order of the files; a row's name is that of its file and its number there.

    Which columns count, `arrow.choose_columns` says. A row without bytes but with a path is that file (relative to the
    common folder of the tables, if it is not absolute); one with neither stays, as an image that cannot be read, so that
    the numbers of the others hold. Labels are used if all rows have one. A broken table is left out, with a warning.

    Raises:
        DataError: no table can be read; one has no image column, or several; pyarrow is missing; the images have to be
            unpacked and there is no room for them.
    """
    if find_spec("pyarrow") is None:
        raise DataError("Arrow and Parquet files need pyarrow: pip install 'fastjepa[tables]'")
    root = common_folder(files)
    warnings: list[str] = []
    complete = True  # an OSError may pass
    tables: list[_Table] = []
    for file in files:
        try:
            tables.append(_open(file))
        except arrow.BrokenTable as error:
            complete &= not isinstance(error.__cause__, OSError)
            warnings.append(f"{file} is left out: {error}")
    if to_unpack := [table for table in tables if table.spans is None]:
        require_space(sum(table.size_unpacked for table in to_unpack), f"{len(to_unpack)} tables")
    parts: list[Part] = []
    for table in tables:
        try:
            parts.append(_part(root, table))
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
    """int64 [n, 2], see `arrow.spans_in_place`; None: yet to be unpacked."""
    unpacked: Unpacked | None = None
    """None: the images are read in place."""
    size_unpacked: int = 0


def _open(file: str) -> _Table:
    columns = arrow.choose_columns(file)
    spans = arrow.spans_in_place(file, columns)
    if spans is not None:
        return _Table(file, columns, spans)
    unpacked = Unpacked(file, columns.bytes)
    return _Table(file, columns, unpacked.spans(), unpacked, arrow.size_unpacked(file))


def _part(root: str, table: _Table) -> Part:
    file, columns, spans = table.file, table.columns, table.spans
    source = os.path.relpath(file, root)
    if spans is None:
        assert table.unpacked is not None
        logger.info("%s: unpacking %.2f GB of images", file, table.size_unpacked / 1e9)
        spans = table.unpacked.write(lambda: arrow.encoded(file, columns))
    files = {os.fsencode(str(table.unpacked.images) if table.unpacked else source): 0}
    place = np.zeros(len(spans), np.int64)
    start, size = spans.T
    without = size < 0
    if without.any():
        size = np.where(without, 0, size)
        paths = arrow.paths(file, columns) if columns.path else ()
        for row, (path, wanted) in enumerate(zip(paths, without.tolist(), strict=False)):
            if wanted and path and "\0" not in path:
                place[row] = files.setdefault(os.fsencode(path), len(files))
                start[row], size[row] = 0, -1
    labels, values = arrow.labels(file, columns) if columns.label else (np.full(len(spans), -1), ())
    return Part(
        names=Strings.of(os.fsencode(f"{source}/{row:06d}") for row in range(len(spans))),
        files=list(files),
        file=place,
        start=start,
        size=size,
        labels=labels,
        values=values,
        in_order=columns.class_names is not None,
    )
