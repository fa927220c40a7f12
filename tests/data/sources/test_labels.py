"""Labels of a source become indices into sorted class names."""

import numpy as np
import pytest

from fastjepa.data.sources.labels import sort_classes


@pytest.mark.parametrize(
    ("values", "class_names", "indices"),
    [
        (["b", "a", "c"], ("a", "b", "c"), [1, 0, 2]),
        (["10", "9", "-1"], ("-1", "9", "10"), [2, 1, 0]),  # by number, not as texts
        (["007", "3", "7"], ("3", "7"), [1, 0, 1]),  # one class
        (["10", "9", "x"], ("10", "9", "x"), [0, 1, 2]),  # one text among them: as texts
        (["1" * 30, "2"], ("1" * 30, "2"), [0, 1]),  # too long for an integer of 64 bits: as texts
    ],
)
def test_classes_are_sorted_by_number_if_all_are_integers_and_else_as_texts(
    values: list[str], class_names: tuple[str, ...], indices: list[int]
) -> None:
    labels, names = sort_classes(np.array([0, 1, 0, *range(len(values))]), values)
    assert names == class_names
    assert labels.dtype == np.int64
    assert labels.tolist() == [indices[0], indices[1], indices[0], *indices]
