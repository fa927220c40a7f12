"""Labels of a source, texts or integers, become indices into sorted class names."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from fastjepa.data.dataset import Ints

_INTEGER = re.compile(r"[+-]?\d{1,18}")


def sort_classes(labels: Ints, values: Sequence[str]) -> tuple[Ints, tuple[str, ...]]:
    """Sort the class names: by number if all are integers, and then `7` and `007` are one class; else as texts.

    Args:
        labels: int64 [n], indices into `values`.
        values: the labels as the source has them, each once, in any order.

    Returns:
        The labels as indices into the class names, int64 [n]; and the class names.
    """
    names: list[str]
    if all(_INTEGER.fullmatch(value) for value in values):
        numbers = sorted({int(value) for value in values})
        names, values = [str(number) for number in numbers], [str(int(value)) for value in values]
    else:
        names = sorted(values)
    place = {name: index for index, name in enumerate(names)}
    return np.array([place[value] for value in values], np.int64)[labels], tuple(names)
