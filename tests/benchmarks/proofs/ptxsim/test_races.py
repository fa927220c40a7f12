"""Accesses that no barrier orders are races."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

from functools import partial

import pytest
import torch
import triton
import triton.language as tl

from benchmarks.proofs import ptxsim
from tests.support.compiled_kernels import needs_compiler
from tests.support.edited_ptx import BARRIER, TARGETS, Product, edits, race_of, recorded_launch, simulate
from tests.support.handwritten_ptx import run

pytestmark = needs_compiler


EXCHANGE = """shl.b32 %r1, %r99, 2; xor.b32 %r2, %r1, {other}; st.shared.b32 [%r1], %r99; {barrier}
ld.shared.b32 %r3, [%r2]; {barrier2} st.shared.b32 [%r1], %r3;"""


def test_warps_must_meet_at_a_barrier_between_write_read_and_write() -> None:
    def exchange(other: int, barrier: str, barrier2: str) -> None:
        run(EXCHANGE.format(other=other, barrier=barrier, barrier2=barrier2), threads=64, shared=256)

    exchange(128, "bar.sync 0;", "bar.sync 0;")
    exchange(64, "", "")  # with another lane of the same warp
    with pytest.raises(ptxsim.RaceFault, match="read of what another warp writes"):
        exchange(128, "", "bar.sync 0;")
    with pytest.raises(ptxsim.RaceFault, match="write of what another warp reads"):
        exchange(128, "bar.sync 0;", "")
    with pytest.raises(ptxsim.RaceFault, match="write of what another warp writes"):
        run("setp.lt.u32 %p1, %r99, 32; @%p1 st.shared.b32 [0], 1; @!%p1 st.shared.b32 [0], 2;", threads=64, shared=16)


def test_a_write_after_reads_of_two_warps_races_with_either() -> None:
    body = """@%p2 st.shared.b32 [0], 0; bar.sync 0; ld.shared.b32 %r1, [0]; {barrier} @{p}%p1 st.shared.b32 [0], 1;"""
    ready = "setp.eq.u32 %p2, %r99, 0; setp.lt.u32 %p1, %r99, 32; "
    for p in ("", "!"):
        run(ready + body.format(p=p, barrier="bar.sync 0;"), threads=64, shared=16)
        with pytest.raises(ptxsim.RaceFault, match="write of what another warp reads"):
            run(ready + body.format(p=p, barrier=""), threads=64, shared=16)


def test_warps_that_write_different_values_to_one_place_race() -> None:
    run("st.shared.b32 [0], 7;", shared=16, threads=64)
    run("st.shared.b32 [0], %r99;", shared=16, threads=32)  # lanes of one warp: one of them wins
    with pytest.raises(ptxsim.RaceFault, match="different values"):
        run("st.shared.b32 [0], %r99;", shared=16, threads=64)


@triton.jit
def write_row_kernel(p_out, divide: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0) // divide
    tl.store(p_out + row * BLOCK + tl.arange(0, BLOCK), 1.0)


@triton.jit
def shift_kernel(p_x, BLOCK: tl.constexpr):
    """Shift in place, which is right within a CTA only if everything is read before anything is written."""
    o_block = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(p_x + o_block, tl.load(p_x + o_block + 1))


@pytest.mark.parametrize("target", TARGETS)
def test_ctas_that_write_one_row_race(target: str) -> None:
    out = torch.zeros(4, 128)
    simulate(recorded_launch(target, write_row_kernel, (4,), out, divide=1, BLOCK=128))
    assert (out == 1).all()
    with pytest.raises(ptxsim.RaceFault):  # although both write the same values
        simulate(recorded_launch(target, write_row_kernel, (4,), out, divide=2, BLOCK=128))


def test_ctas_race_also_in_different_instructions() -> None:
    body = """mov.u32 %r1, %ctaid.x; setp.eq.u32 %p1, %r1, 0; mad.wide.u32 %rd1, %r99, 4, %rd10;
    @%p1 st.global.b32 [%rd1], 7; @!%p1 {} ;"""
    run(body.format("st.global.b32 [%rd1+128], 7"), torch.zeros(64), ctas=2)
    for access in ("st.global.b32 [%rd1], 7", "ld.global.b32 %r2, [%rd1]"):
        with pytest.raises(ptxsim.RaceFault, match=r"CTA \(1, 0, 0\)"):
            run(body.format(access), torch.zeros(64), ctas=2)


@pytest.mark.parametrize("reads", ["ld.global.b32 %r2, [%rd1];", "@%p1 {0} @!%p1 {0}", "@!%p1 {0} @%p1 {0}"])
@pytest.mark.parametrize("writer", ["@%p1", "@!%p1"])
def test_a_write_after_reads_of_two_ctas_races_with_either(reads: str, writer: str) -> None:
    body = f"""mov.u32 %r1, %ctaid.x; setp.eq.u32 %p1, %r1, 0; mad.wide.u32 %rd1, %r99, 4, %rd10;
    {reads.format("ld.global.b32 %r2, [%rd1];")} bar.sync 0;"""
    run(body, torch.zeros(32), ctas=2)
    with pytest.raises(ptxsim.RaceFault, match="write of what another warp reads"):
        run(f"{body} {writer} st.global.b32 [%rd1], 7;", torch.zeros(32), ctas=2)


def test_reading_what_another_warp_or_cta_writes_is_a_race() -> None:
    with pytest.raises(ptxsim.RaceFault):
        simulate(recorded_launch("sm_80", shift_kernel, (1,), torch.zeros(257), BLOCK=256))
    with pytest.raises(ptxsim.RaceFault):
        simulate(recorded_launch("sm_80", shift_kernel, (2,), torch.zeros(65), BLOCK=32, num_warps=1))
    simulate(
        recorded_launch("sm_80", shift_kernel, (1,), torch.zeros(33), BLOCK=32, num_warps=1)
    )  # one warp: reads, then writes


@triton.jit
def reduce_kernel(p_x, p_out, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Two sums, one after the other, through the same shared memory."""
    o_row, o_column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    x = tl.load(p_x + o_row[:, None] * COLUMNS + o_column)  # [ROWS, COLUMNS]
    tl.store(p_out + o_column, tl.sum(x * tl.sum(x, 1)[:, None], 0))


@pytest.mark.parametrize("target", TARGETS)
def test_barriers_left_out_of_a_reduction_are_found(target: str) -> None:
    x, out = torch.randn(64, 64), torch.full((64,), torch.nan)
    launch = recorded_launch(target, reduce_kernel, (1,), x, out, ROWS=64, COLUMNS=64)
    simulate(launch)
    torch.testing.assert_close(out, (x * x.sum(1, keepdim=True)).sum(0), rtol=1e-4, atol=1e-3)
    found = [race_of(partial(simulate, launch), ptx) for ptx in edits(launch.kernel.asm["ptx"], BARRIER, "")]
    assert sum("read of what another warp writes" in fault for fault in found) > 1
    assert any("write of what another warp reads" in fault for fault in found)


@pytest.mark.parametrize("target", TARGETS)
def test_barriers_left_out_of_a_pipelined_product_are_found(target: str) -> None:
    product = Product(target, torch.bfloat16)
    found = [race_of(product.error, ptx) for ptx in edits(product.ptx, BARRIER, "")]
    assert any("read of what another warp writes" in fault for fault in found)
    assert any("write of what another warp reads" in fault for fault in found)
