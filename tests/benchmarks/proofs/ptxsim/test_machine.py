"""The simulator's checks, each against a planted fault, and its counts, which are exact.

Faults are planted in PTX written by hand, or by edits of the PTX of compiled kernels, which pass as they are.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import os
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from benchmarks.proofs import ptxsim
from benchmarks.proofs.aot.launches import Launch, recorded
from tests.support.handwritten_ptx import run

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="needs Triton's compiler")

TARGETS = ["sm_80", "sm_90"]


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


@triton.jit
def copy_kernel(p_in, p_out, n, BLOCK: tl.constexpr):
    o_block = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_block = o_block < n
    tl.store(p_out + o_block, tl.load(p_in + o_block, mask=m_block), mask=m_block)


def compiled(target: str, kernel: Any, grid: tuple[int, ...], *arguments: Any, **constexprs: Any) -> Launch:
    with recorded(target) as launches:
        kernel[grid](*arguments, **constexprs)
    return launches[0]


def simulate(launch: Launch, ptx: str | None = None) -> dict[str, Any]:
    """Run a recorded launch, or the same with edited PTX."""
    edited = ptx or launch.kernel.asm["ptx"]
    return ptxsim.run_ptx(edited, launch.kernel.metadata.shared, launch.grid, list(launch.arguments.values())).summary()


@pytest.mark.parametrize("target", TARGETS)
def test_a_copy_moves_each_byte_once(target: str) -> None:
    n = 1024 + 512
    x, out = torch.randn(n), torch.full((n,), torch.nan)
    counts = simulate(compiled(target, copy_kernel, (2,), x, out, n, BLOCK=1024))
    assert torch.equal(out, x)
    assert counts["global_sectors"] == {"load": 4 * n // 32, "store": 4 * n // 32}
    assert counts["global_requests"] == {"load": 4 * n // 512, "store": 4 * n // 512}  # 16 bytes for each lane
    assert counts["useful_bytes"] == {"load": 4 * n, "store": 4 * n}
    assert counts["sector_efficiency"] == {"load": 1.0, "store": 1.0}


def edits(ptx: str, pattern: str, replacement: str) -> list[str]:
    """The PTX with one match replaced, for every match."""
    found = [ptx[: m.start()] + m.expand(replacement) + ptx[m.end() :] for m in re.finditer(pattern, ptx)]
    assert found, pattern
    return found


BARRIER = r"\tbar\.sync \t0;"


def race_of(action: Callable[[str], object], ptx: str) -> str:
    """The race that an edit makes, or "": compilers may set more barriers than needed."""
    try:
        action(ptx)
    except ptxsim.RaceFault as fault:
        return str(fault)
    return ""


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("access", [r"ld\.global", r"st\.global"])
def test_a_mask_left_out_is_out_of_bounds(target: str, access: str) -> None:
    x, out = torch.randn(1000), torch.zeros(1000)
    launch = compiled(target, copy_kernel, (2,), x, out, 1000, BLOCK=512)
    simulate(launch)
    assert torch.equal(out, x)
    for ptx in edits(launch.kernel.asm["ptx"], rf"@%p\d+ ({access})", r"\1"):
        with pytest.raises(ptxsim.OutOfBoundsFault, match=r"CTA \(1, 0, 0\).*test_ptxsim\.py:\d+"):
            simulate(launch, ptx)


@pytest.mark.parametrize("access", ["ld", "st"])
def test_an_address_off_by_one_element_is_out_of_bounds_or_misaligned(access: str) -> None:
    x, out = torch.randn(33)[1:], torch.zeros(33)[1:]  # not aligned to 16 bytes: accesses of one element
    launch = compiled("sm_80", copy_kernel, (1,), x, out, 32, BLOCK=32)
    simulate(launch)
    pattern = rf"({access}\.global\.\S+ .*\[ %rd\d+ \+) 0 \]"
    for offset in (4, -4):
        for ptx in edits(launch.kernel.asm["ptx"], pattern, rf"\1 {offset} ]"):
            with pytest.raises(ptxsim.OutOfBoundsFault):
                simulate(launch, ptx)
    x, out = torch.randn(1024), torch.zeros(1024)
    launch = compiled("sm_80", copy_kernel, (1,), x, out, 1024, BLOCK=1024)
    assert ".v4" in launch.kernel.asm["ptx"]
    for ptx in edits(launch.kernel.asm["ptx"], pattern, r"\1 4 ]"):
        with pytest.raises(ptxsim.MisalignedFault):
            simulate(launch, ptx)


def test_the_gaps_of_a_strided_view_are_out_of_bounds() -> None:
    whole = torch.zeros(4, 2, 16)
    columns = whole[:, 0]
    assert columns.stride() == (32, 1)
    body = "setp.lt.u32 %p1, %r99, {}; mad.wide.u32 %rd1, %r99, 4, %rd10; @%p1 st.global.b32 [%rd1+128], 0;"
    run(body.format(16), columns)
    with pytest.raises(ptxsim.OutOfBoundsFault, match="thread 16 "):
        run(body.format(32), columns)
    run(body.format(32), columns, whole[:, 1])  # what lies in the gaps is passed as well


def test_a_store_beyond_the_view_but_within_the_storage_is_out_of_bounds() -> None:
    storage = torch.zeros(64)
    with pytest.raises(ptxsim.OutOfBoundsFault, match="thread 16 "):
        run("mad.wide.u32 %rd1, %r99, 4, %rd10; st.global.b32 [%rd1], 0;", storage[:16])


@pytest.mark.parametrize(
    ("access", "fault"), [("[%r1+4]", ptxsim.OutOfBoundsFault), ("[%r1+2]", ptxsim.MisalignedFault)]
)
def test_shared_memory_has_bounds_and_alignment(access: str, fault: type[ptxsim.Fault]) -> None:
    body = "shl.b32 %r1, %r99, 2; st.shared.b32 {}, %r99;"
    run(body.format("[%r1]"), shared=128)
    with pytest.raises(fault):
        run(body.format(access), shared=128)


def test_shared_memory_that_was_not_written_may_not_be_read() -> None:
    body = "shl.b32 %r1, %r99, 2; setp.ne.u32 %p1, %r99, 5; {} st.shared.b32 [%r1], %r99; ld.shared.b32 %r2, [%r1];"
    run(body.format(""), shared=128)
    with pytest.raises(ptxsim.UninitialisedFault, match="thread 5 "):
        run(body.format("@%p1"), shared=128)


def test_shared_memory_is_of_one_cta() -> None:
    body = """mov.u32 %r2, %ctaid.x; setp.eq.u32 %p1, %r2, 0; shl.b32 %r1, %r99, 2;
    @%p1 st.shared.b32 [%r1], %r99; ld.shared.b32 %r3, [%r1];"""
    with pytest.raises(ptxsim.UninitialisedFault, match=r"CTA \(1, 0, 0\)"):
        run(body, shared=128, ctas=2)


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


def test_copies_land_group_by_group_and_lane_by_lane() -> None:
    x = torch.arange(64, dtype=torch.float32)
    copies = """shl.b32 %r1, %r99, 2; mad.wide.u32 %rd1, %r99, 4, %rd10; mad.wide.u32 %rd2, %r99, 4, %rd11;
    cp.async.ca.shared.global [%r1], [%rd1], 4; cp.async.commit_group;
    cp.async.ca.shared.global [%r1+128], [%rd1+128], 4; cp.async.commit_group;"""
    first = "ld.shared.b32 %r2, [%r1]; st.global.b32 [%rd2], %r2;"
    second = "ld.shared.b32 %r2, [%r1+128]; st.global.b32 [%rd2], %r2;"
    for code, expected in ((f"cp.async.wait_group 1; {first}", x[:32]), (f"cp.async.wait_group 0; {second}", x[32:])):
        out = torch.zeros(32)
        run(copies + code, x, out, shared=256)
        assert torch.equal(out, expected)
    with pytest.raises(ptxsim.PendingFault):
        run(f"{copies} cp.async.wait_group 1; {second}", x, torch.zeros(32), shared=256)
    some = "setp.lt.u32 %p1, %r99, 20; @%p1 cp.async.wait_group 0;"
    run(f"{copies} {some} @%p1 ld.shared.b32 %r2, [%r1];", x, torch.zeros(32), shared=256)
    with pytest.raises(ptxsim.PendingFault, match="thread 20 "):
        run(f"{copies} {some} {first}", x, torch.zeros(32), shared=256)


def test_warps_that_write_different_values_to_one_place_race() -> None:
    run("st.shared.b32 [0], 7;", shared=16, threads=64)
    run("st.shared.b32 [0], %r99;", shared=16, threads=32)  # lanes of one warp: one of them wins
    with pytest.raises(ptxsim.RaceFault, match="different values"):
        run("st.shared.b32 [0], %r99;", shared=16, threads=64)


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


def test_lanes_that_part_meet_again() -> None:
    """A loop of as many rounds as the lane's number; 100 - tid rounds for the others."""
    body = """mov.b32 %r1, 0; mov.b32 %r2, 0;
    $LOOP: setp.ge.u32 %p1, %r1, %r99; @%p1 bra $END; add.s32 %r1, %r1, 1; add.s32 %r2, %r2, %r1; bra.uni $LOOP;
    $END: bar.sync 0; mad.wide.u32 %rd1, %r99, 4, %rd10; st.global.b32 [%rd1], %r2;"""
    out = torch.zeros(64, dtype=torch.int32)
    counts = run(body, out, threads=64)
    thread = torch.arange(64)
    assert torch.equal(out.long(), thread * (thread + 1) // 2)
    assert counts["by_class"]["bar"] == 2  # once for each warp, not for each way through the loop


@triton.jit
def write_row_kernel(p_out, divide: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0) // divide
    tl.store(p_out + row * BLOCK + tl.arange(0, BLOCK), 1.0)


@triton.jit
def shift_kernel(p_x, BLOCK: tl.constexpr):
    """In place, which is right within a CTA only where all is read before anything is written."""
    o_block = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(p_x + o_block, tl.load(p_x + o_block + 1))


@pytest.mark.parametrize("target", TARGETS)
def test_ctas_that_write_one_row_race(target: str) -> None:
    out = torch.zeros(4, 128)
    simulate(compiled(target, write_row_kernel, (4,), out, divide=1, BLOCK=128))
    assert (out == 1).all()
    with pytest.raises(ptxsim.RaceFault):  # though both write the same
        simulate(compiled(target, write_row_kernel, (4,), out, divide=2, BLOCK=128))


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
        simulate(compiled("sm_80", shift_kernel, (1,), torch.zeros(257), BLOCK=256))
    with pytest.raises(ptxsim.RaceFault):
        simulate(compiled("sm_80", shift_kernel, (2,), torch.zeros(65), BLOCK=32, num_warps=1))
    simulate(
        compiled("sm_80", shift_kernel, (1,), torch.zeros(33), BLOCK=32, num_warps=1)
    )  # one warp: reads, then writes


@triton.jit
def reduce_kernel(p_x, p_out, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Two sums that follow one another through the same shared memory."""
    o_row, o_column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    x = tl.load(p_x + o_row[:, None] * COLUMNS + o_column)  # [ROWS, COLUMNS]
    tl.store(p_out + o_column, tl.sum(x * tl.sum(x, 1)[:, None], 0))


@pytest.mark.parametrize("target", TARGETS)
def test_barriers_left_out_of_a_reduction_are_found(target: str) -> None:
    x, out = torch.randn(64, 64), torch.full((64,), torch.nan)
    launch = compiled(target, reduce_kernel, (1,), x, out, ROWS=64, COLUMNS=64)
    simulate(launch)
    torch.testing.assert_close(out, (x * x.sum(1, keepdim=True)).sum(0), rtol=1e-4, atol=1e-3)
    found = [race_of(partial(simulate, launch), ptx) for ptx in edits(launch.kernel.asm["ptx"], BARRIER, "")]
    assert sum("read of what another warp writes" in fault for fault in found) > 1
    assert any("write of what another warp reads" in fault for fault in found)


@triton.jit
def matmul_kernel(p_a, p_b, p_c, K, M: tl.constexpr, N: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr):
    """c = a @ b; a loop over K, so that the loads are pipelined."""
    o_m, o_n, o_k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BK)
    accumulator = tl.zeros((M, N), tl.float32)
    for k in tl.range(0, K, BK, num_stages=STAGES):
        a = tl.load(p_a + o_m[:, None] * K + (k + o_k)[None, :])  # [M, BK]
        b = tl.load(p_b + (k + o_k)[:, None] * N + o_n[None, :])  # [BK, N]
        accumulator = tl.dot(a, b, accumulator)
    tl.store(p_c + o_m[:, None] * N + o_n[None, :], accumulator)


class Product:
    """A matrix product: its launch, and whether the result is right."""

    def __init__(self, target: str, dtype: torch.dtype, k: int = 128) -> None:
        generator = torch.Generator().manual_seed(0)
        self.a, self.b = (
            torch.randn(64, k, generator=generator).to(dtype),
            torch.randn(k, 32, generator=generator).to(dtype),
        )
        self.c = torch.empty(64, 32)
        block = 16 if dtype == torch.float32 else 32
        self.launch = compiled(target, matmul_kernel, (1,), self.a, self.b, self.c, k, M=64, N=32, BK=block, STAGES=3)
        self.ptx: str = self.launch.kernel.asm["ptx"]

    def error(self, ptx: str | None = None) -> float:
        self.c.fill_(torch.nan)
        simulate(self.launch, ptx)
        return (self.c.double() - self.a.double() @ self.b.double()).abs().max().item()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_compiled_matrix_products_are_right(target: str, dtype: torch.dtype) -> None:
    product = Product(target, dtype)
    assert ("wgmma" if target == "sm_90" else "mma.sync") in product.ptx
    assert product.error() < (0.05 if dtype == torch.float32 else 1e-4)  # f32: in tf32


@pytest.mark.parametrize(
    ("pattern", "replacement"),
    [
        (r"(mma\.sync\S+ \{.*?\}, \{ )(%r\d+), (%r\d+)", r"\1\3, \2"),
        (r"(mma\.sync\S+ \{.*?\}, \{.*?\}, \{ )(%r\d+), (%r\d+)", r"\1\3, \2"),
        (r"\.trans", ""),
        (r"(ldmatrix.*x4)\.shared", r"\1.trans.shared"),
    ],
    ids=["A's registers", "B's registers", "trans left out", "trans added"],
)
def test_a_wrong_fragment_gives_wrong_numbers(pattern: str, replacement: str) -> None:
    product = Product("sm_80", torch.bfloat16)
    assert product.error() < 1e-4
    for ptx in edits(product.ptx, pattern, replacement):
        assert product.error(ptx) > 1


@pytest.mark.parametrize("target", TARGETS)
def test_copies_must_be_waited_for(target: str) -> None:
    """A wait that is left out is a fault, or was not needed: never wrong numbers."""
    product = Product(target, torch.bfloat16)
    faults = []
    for ptx in edits(product.ptx, r"cp\.async\.wait_group \t?\d+;", ""):
        try:
            assert product.error(ptx) < 1e-4
        except ptxsim.PendingFault as fault:
            faults.append(str(fault))
    assert faults
    assert all("destination of an asynchronous copy" in fault for fault in faults)


@pytest.mark.parametrize(
    "pattern", [r"wgmma\.wait_group\.sync\.aligned \d+;", r"fence\.proxy\.async\S*;"], ids=["wait", "fence"]
)
def test_warpgroup_products_must_be_waited_for_and_their_operands_fenced(pattern: str) -> None:
    product = Product("sm_90", torch.bfloat16)
    for ptx in edits(product.ptx, pattern, ""):
        with pytest.raises(ptxsim.PendingFault, match=r"matrix (product|operand)"):
            product.error(ptx)


@pytest.mark.parametrize("target", TARGETS)
def test_barriers_left_out_of_a_pipelined_product_are_found(target: str) -> None:
    product = Product(target, torch.bfloat16)
    found = [race_of(product.error, ptx) for ptx in edits(product.ptx, BARRIER, "")]
    assert any("read of what another warp writes" in fault for fault in found)
    assert any("write of what another warp reads" in fault for fault in found)


def test_too_little_shared_memory_is_out_of_bounds() -> None:
    product = Product("sm_80", torch.bfloat16)
    arguments = list(product.launch.arguments.values())
    with pytest.raises(ptxsim.OutOfBoundsFault, match="shared-memory"):
        ptxsim.run_ptx(product.ptx, product.launch.kernel.metadata.shared - 16, (1,), arguments)


def test_what_a_masked_load_leaves_out_is_nan() -> None:
    x, out = torch.ones(16), torch.zeros(32)
    body = """mad.wide.u32 %rd1, %r99, 4, %rd10; mad.wide.u32 %rd2, %r99, 4, %rd11; setp.lt.u32 %p1, %r99, 16;
    @%p1 ld.global.b32 %r1, [%rd1]; st.global.b32 [%rd2], %r1;"""
    run(body, x, out)
    assert (out[:16] == 1).all()
    assert out[16:].isnan().all()


@pytest.mark.parametrize(
    "statement",
    [
        "frobnicate.b32 %r1, %r2;",
        "add.sat.s32 %r1, %r2, %r3;",
        "mov.u32 %r1, %clock;",
        "bar.sync 1, 64;",
        "ld.acquire.global.b32 %r1, [%rd1];",
        "cvt.rn.satfinite.e4m3x2.f32 %rs1, %r1, %r2;",
        "st.local.b32 [%rd1], %r1;",
    ],
)
def test_what_is_not_known_is_refused_with_its_line(statement: str) -> None:
    with pytest.raises(NotImplementedError, match=re.escape(f"`{statement.rstrip(';')}`")):
        run(statement)
