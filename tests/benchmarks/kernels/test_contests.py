"""The contests cover all operations."""

from __future__ import annotations

from benchmarks.kernels.contests import CONTESTS
from fastjepa_kernels import OPERATIONS


def test_every_operation_has_a_contest() -> None:
    assert set(CONTESTS) == set(OPERATIONS)
