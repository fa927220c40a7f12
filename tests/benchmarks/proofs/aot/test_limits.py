"""Every kind of limit can be broken."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.proofs.aot.compiled import PROCESSORS, Compiled
from benchmarks.proofs.aot.limits import Limits, broken_limits
from tests.support.compiled_kernels import compiled, copied, multiplied, transpose


def broken(result: Compiled, *, half: bool = False, **stated: Any) -> str:
    return "\n".join(broken_limits(result, Limits(**stated), half=half))


def test_spills_break_a_limit() -> None:
    plenty, few = multiplied(target="sm_80"), multiplied(target="sm_80", maxnreg=40)
    assert broken(plenty) == ""
    assert few.spill_bytes > 0
    assert "spills" in broken(few)
    assert broken(few, spill_bytes=few.spill_bytes) == ""


def test_scalar_accesses_break_a_limit() -> None:
    assert broken(copied(), wide_fraction=1.0) == ""
    assert "16 bytes wide" in broken(copied(n=4095), wide_fraction=0.5)


def test_missing_tensor_cores_break_a_limit() -> None:
    assert broken(multiplied(), half=True, tensor_cores=True) == ""
    assert "tensor cores" in broken(copied(), half=True, tensor_cores=True)
    assert broken(copied(), half=False, tensor_cores=True) == ""


def test_too_much_shared_memory_breaks_a_limit() -> None:
    """The compiler accepts it; only a launch would fail."""
    large = torch.empty(256, 256)
    result = compiled(transpose, large, large, BLOCK=256, num_warps=8, target="sm_80")
    assert result.shared_bytes > PROCESSORS["sm_80"].shared_bytes_per_block
    assert "does not fit" in broken(result)


def test_low_occupancy_breaks_a_limit() -> None:
    assert broken(copied(), blocks_per_sm=copied().blocks_per_sm) == ""
    assert "blocks per SM" in broken(copied(), blocks_per_sm=copied().blocks_per_sm + 1)


def test_serialized_matrix_instructions_break_a_limit() -> None:
    note = "Potential Performance Loss: wgmma.mma_async instructions are serialized due to a call in function 'product'"
    assert "serialized" in broken(multiplied(log=f"ptxas info    : (C7510) {note}\n"))
