"""Samples of many files (shards, tables), joined into one data set."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastjepa.data.dataset import ImageDataset, Ints, Spans, Strings
from fastjepa.data.sources.index import Listing
from fastjepa.data.sources.labels import sort_classes


@dataclass(frozen=True)
class FileSamples:
    """The n samples that one shard or table gives."""

    names: Strings
    files: Sequence[bytes]
    """The files in which the samples lie: the shard or table itself, or others that it points to."""
    file: Ints
    """int64 [n], indices into `files`."""
    start: Ints
    size: Ints
    """int64 [n]; see Spans."""
    labels: Ints
    """int64 [n], indices into `values`; -1: no label."""
    values: Sequence[str]
    """The labels as the file has them, each once."""
    in_order: bool = False
    """True: the values are class names in their final order. False: they are still to be sorted."""


def common_folder(files: Sequence[str]) -> str:
    """The deepest folder that holds all files."""
    return os.path.commonpath([os.path.dirname(file) for file in files])  # noqa: PTH120 (as they are, unresolved)


def join(root: str, parts: Sequence[FileSamples], watched: list[bytes], warnings: list[str]) -> Listing:
    """Join the samples of one or more files, file by file. Labels are used only if all samples have one.

    Args:
        root: the folder that names and files are relative to.
        parts: the samples of each file.
        watched, warnings: see `Listing`.
    """
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
        labels, values = sort_classes(labels, values)
    return Listing(ImageDataset(root, names, labels, values, spans), watched, warnings)
