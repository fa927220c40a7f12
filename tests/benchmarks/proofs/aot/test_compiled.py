"""Figures read from compiled kernels: widths of accesses, matrix instructions, registers, occupancy."""

from __future__ import annotations

import pytest
import torch

from benchmarks.proofs.aot.compiled import PROCESSORS, Compilations, analyse, blocks_per_sm
from benchmarks.proofs.aot.launches import recorded
from tests.support.compiled_kernels import copied, copy, multiplied


def test_accesses_are_counted_by_width() -> None:
    assert copied().loads == {16: 2}
    assert copied().stores == {16: 2}
    assert copied().wide_fraction == 1
    assert copied(n=4095).loads == {4: 8}
    assert copied(n=4095).wide_fraction == 0


@pytest.mark.parametrize(
    ("target", "family"), [("sm_80", "mma"), ("sm_90", "wgmma"), ("sm_100", "tcgen05"), ("gfx942", "mfma")]
)
def test_matrix_instructions_are_counted(target: str, family: str) -> None:
    result = multiplied(target=target)
    assert result.mma > 0
    assert result.mma_family == family
    assert result.fits


def test_a_kernel_compiled_before_is_read() -> None:
    """Triton's cache keeps the kernel, but not ptxas's log. The report must not take a missing log for zero spills."""
    tensors = torch.empty(96), torch.empty(96)
    with recorded("sm_80") as launches:
        copy[(1,)](*tensors, 96, BLOCK=32, num_warps=1)
    before = launches[0].kernel
    assert analyse(before, "sm_80", Compilations().facts(before)).registers > 0


def test_a_kernel_compiled_by_another_installation_is_read() -> None:
    """Triton's cache outlives the virtual environment that filled it, and names libraries in it."""
    with recorded("sm_80") as launches:
        copy[(1,)](torch.empty(96), torch.empty(96), 96, BLOCK=64, num_warps=1)
    kernel = launches[0].kernel
    kernel.metadata = kernel.metadata._replace(extern_libs=[["libdevice", "/gone/libdevice.10.bc"]])
    assert analyse(kernel, "sm_80", Compilations().facts(kernel)).registers > 0


@pytest.mark.parametrize(
    ("target", "num_warps", "registers", "shared", "expected"),
    [
        ("sm_80", 8, 32, 0, 8),  # 64 warps
        ("sm_80", 4, 128, 0, 4),  # 65,536 / (128 * 128)
        ("sm_80", 4, 129, 0, 3),  # registers come in units of 256 a warp: 136 for each thread
        ("sm_80", 1, 16, 0, 32),  # 32 blocks
        ("sm_80", 4, 32, 100 << 10, 1),  # 164 KB
        ("sm_90", 4, 32, 100 << 10, 2),  # 228 KB
        ("sm_80", 4, 32, 163 << 10, 1),
        ("sm_80", 4, 32, (163 << 10) + 1, 0),
    ],
)
def test_blocks_per_sm_follow_from_the_scarcest_resource(
    target: str, num_warps: int, registers: int, shared: int, expected: int
) -> None:
    assert min(blocks_per_sm(PROCESSORS[target], num_warps, registers, shared, 0).values()) == expected
