"""Lanes that diverge, whole warps, and registers that were never written."""

from __future__ import annotations

import pytest
import torch

from benchmarks.proofs import ptxsim
from tests.support.handwritten_ptx import run


def test_a_barrier_in_a_divergent_branch_is_found() -> None:
    body = "setp.lt.u32 %p1, %r99, {}; @%p1 bra $A; bra $B; $A: bar.sync 0; $B: bar.sync 0;"
    run(body.format(32), threads=64)
    with pytest.raises(ptxsim.DivergenceFault, match="part of warp 0"):
        run(body.format(20), threads=64)


@pytest.mark.parametrize(
    "statement",
    ["shfl.sync.bfly.b32 %r1, %r99, 1, 31, -1;", "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r1}, [0];"],
)
def test_an_instruction_of_whole_warps_needs_all_lanes(statement: str) -> None:
    store = "shl.b32 %r3, %r99, 2; st.shared.b32 [%r3], %r99; bar.sync 0; "
    run(f"{store} setp.lt.u32 %p1, %r99, 32; @%p1 {statement}", threads=64, shared=256)
    with pytest.raises(ptxsim.DivergenceFault, match="thread 32 "):
        run(f"{store} setp.lt.u32 %p1, %r99, 48; @%p1 {statement}", threads=64, shared=256)


def test_lanes_that_diverge_meet_again() -> None:
    """Every lane runs a loop as many times as its number."""
    body = """mov.b32 %r1, 0; mov.b32 %r2, 0;
    $LOOP: setp.ge.u32 %p1, %r1, %r99; @%p1 bra $END; add.s32 %r1, %r1, 1; add.s32 %r2, %r2, %r1; bra.uni $LOOP;
    $END: bar.sync 0; mad.wide.u32 %rd1, %r99, 4, %rd10; st.global.b32 [%rd1], %r2;"""
    out = torch.zeros(64, dtype=torch.int32)
    counts = run(body, out, threads=64)
    thread = torch.arange(64)
    assert torch.equal(out.long(), thread * (thread + 1) // 2)
    assert counts["by_class"]["bar"] == 2  # once for each warp, not for each way through the loop


def test_a_register_that_a_masked_load_leaves_out_is_nan() -> None:
    x, out = torch.ones(16), torch.zeros(32)
    body = """mad.wide.u32 %rd1, %r99, 4, %rd10; mad.wide.u32 %rd2, %r99, 4, %rd11; setp.lt.u32 %p1, %r99, 16;
    @%p1 ld.global.b32 %r1, [%rd1]; st.global.b32 [%rd2], %r1;"""
    run(body, x, out)
    assert (out[:16] == 1).all()
    assert out[16:].isnan().all()
