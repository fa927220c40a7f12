"""Bounds from the data sheets."""

from __future__ import annotations

import pytest
import torch

from benchmarks.kernel_cases import Work
from benchmarks.proofs.aot.roofline import bound


def test_bound_is_the_slower_of_memory_and_arithmetic() -> None:
    assert bound(Work(bytes=3_350_000), torch.bfloat16, "H100").microseconds == pytest.approx(1)
    assert bound(Work(bytes=3_350_000, flops=10**9), torch.bfloat16, "H100").limiter == "arithmetic"
    assert bound(Work(1, 67 * 10**6), torch.float32, "H100").microseconds == pytest.approx(1)
