"""The simulator's counts are exact: wavefronts, sectors, requests, useful bytes."""

from __future__ import annotations

import pytest
import torch

from tests.support.compiled_kernels import needs_compiler
from tests.support.edited_ptx import TARGETS, copy_kernel, recorded_launch, simulate
from tests.support.handwritten_ptx import run

pytestmark = needs_compiler


@pytest.mark.parametrize(
    ("size", "shift", "wavefronts", "ideal"),
    [(4, 2, 1, 1), (4, 3, 2, 1), (4, 7, 32, 1), (8, 3, 2, 2), (16, 4, 4, 4), (16, 7, 32, 4), (2, 1, 1, 1)],
)
def test_wavefronts_of_shared_memory(size: int, shift: int, wavefronts: int, ideal: int) -> None:
    registers = {
        2: "b16 [%r1], %rs1",
        4: "b32 [%r1], %r2",
        8: "v2.b32 [%r1], {%r2, %r3}",
        16: "v4.b32 [%r1], {%r2,%r3,%r4,%r5}",
    }
    counts = run(f"shl.b32 %r1, %r99, {shift}; st.shared.{registers[size]};", shared=4096)
    assert (counts["smem_wavefronts"], counts["smem_ideal"]) == (wavefronts, ideal)


def test_a_word_read_by_all_lanes_is_one_wavefront_and_one_sector() -> None:
    x = torch.zeros(32)
    counts = run("st.shared.b32 [0], 0; ld.shared.b32 %r1, [0]; ld.global.b32 %r2, [%rd10];", x, shared=16)
    assert (counts["smem_wavefronts"], counts["smem_ideal"]) == (2, 2)
    assert counts["global_sectors"]["load"] == 1
    assert counts["useful_bytes"]["load"] == 4


def test_sectors_of_a_strided_access() -> None:
    x = torch.zeros(32 * 32)
    counts = run("mad.wide.u32 %rd1, %r99, 128, %rd10; ld.global.b32 %r1, [%rd1]; st.global.b32 [%rd1], %r1;", x)
    assert counts["global_sectors"] == {"load": 32, "store": 32}
    assert counts["global_requests"] == {"load": 1, "store": 1}
    assert counts["sector_efficiency"] == {"load": 0.125, "store": 0.125}


@pytest.mark.parametrize("target", TARGETS)
def test_a_copy_moves_each_byte_once(target: str) -> None:
    n = 1024 + 512
    x, out = torch.randn(n), torch.full((n,), torch.nan)
    counts = simulate(recorded_launch(target, copy_kernel, (2,), x, out, n, BLOCK=1024))
    assert torch.equal(out, x)
    assert counts["global_sectors"] == {"load": 4 * n // 32, "store": 4 * n // 32}
    assert counts["global_requests"] == {"load": 4 * n // 512, "store": 4 * n // 512}  # 16 bytes for each lane
    assert counts["useful_bytes"] == {"load": 4 * n, "store": 4 * n}
    assert counts["sector_efficiency"] == {"load": 1.0, "store": 1.0}
