"""What was found in each of many files (shards, tables), and a data set made of it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastjepa.data.dataset import ImageDataset, Ints, Spans, Strings
from fastjepa.data.sources.index import Listing
from fastjepa.data.sources.labels import classes


@dataclass(frozen=True)
class Part:
    """The n samples of one file."""

    names: Strings
    files: Sequence[bytes]
    """Where the samples lie: the file, or others that it points to."""
    file: Ints
    """int64 [n], indices into `files`."""
    start: Ints
    size: Ints
    """int64 [n]; see Spans."""
    labels: Ints
    """int64 [n], indices into `values`; -1: none."""
    values: Sequence[str]
    """Labels, each once."""
    in_order: bool = False
    """The values are class names in their order; otherwise they are sorted."""


def common_folder(files: Sequence[str]) -> str:
    return os.path.commonpath([os.path.dirname(file) for file in files])  # noqa: PTH120 (as they are, unresolved)


def join(root: str, parts: Sequence[Part], watched: list[bytes], warnings: list[str]) -> Listing:
    """The samples of all parts, one part after the other; labels only if all have one. At least one part."""
    offsets = np.cumsum([0, *(len(part.files) for part in parts)])
    spans = Spans(
        Strings.of(file for part in parts for file in part.files),
        np.concatenate([part.file + offset for part, offset in zip(parts, offsets[:-1], strict=True)], dtype=np.int32),
        np.concatenate([part.start for part in parts]),
        np.concatenate([part.size for part in parts]),
    )
    names = Strings.of(name for part in parts for name in part.names)
    number: dict[str, int] = {}
    numbers = [np.array([number.setdefault(v, len(number)) for v in part.values] + [-1]) for part in parts]
    labels = np.concatenate([here[part.labels] for here, part in zip(numbers, parts, strict=True)])
    values = tuple(number)
    missing = int(np.count_nonzero(labels < 0))
    if missing:
        if missing < len(labels):
            warnings = [*warnings, f"{root}: {missing} of {len(labels)} samples have no label: no labels are used"]
        return Listing(ImageDataset(root, names, None, (), spans), watched, warnings)
    if not all(part.in_order for part in parts):
        labels, values = classes(labels, values)
    return Listing(ImageDataset(root, names, labels, values, spans), watched, warnings)
