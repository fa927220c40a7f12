"""Labels as they stand in a source: texts or integers, which become indices into sorted class names."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from fastjepa.data.dataset import Ints

_INTEGER = re.compile(r"[+-]?\d{1,18}")


def classes(labels: Ints, values: Sequence[str]) -> tuple[Ints, tuple[str, ...]]:
    """Sorted class names, by number if all are integers (`7` and `007` are one class then).

    Args:
        labels: int64 [n], indices into `values`.
        values: what the source says, each once, in any order.

    Returns:
        int64 [n], indices into the class names; and these.
    """
    names: list[str]
    if all(_INTEGER.fullmatch(value) for value in values):
        numbers = sorted({int(value) for value in values})
        names, values = [str(number) for number in numbers], [str(int(value)) for value in values]
    else:
        names = sorted(values)
    place = {name: index for index, name in enumerate(names)}
    return np.array([place[value] for value in values], np.int64)[labels], tuple(names)
