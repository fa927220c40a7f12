"""Accesses out of bounds, misaligned or of uninitialised memory are faults."""

from __future__ import annotations

import pytest
import torch

from benchmarks.proofs import ptxsim
from tests.support.compiled_kernels import needs_compiler
from tests.support.edited_ptx import TARGETS, Product, copy_kernel, edits, recorded_launch, simulate
from tests.support.handwritten_ptx import run

pytestmark = needs_compiler


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("access", [r"ld\.global", r"st\.global"])
def test_a_mask_left_out_is_out_of_bounds(target: str, access: str) -> None:
    x, out = torch.randn(1000), torch.zeros(1000)
    launch = recorded_launch(target, copy_kernel, (2,), x, out, 1000, BLOCK=512)
    simulate(launch)
    assert torch.equal(out, x)
    for ptx in edits(launch.kernel.asm["ptx"], rf"@%p\d+ ({access})", r"\1"):
        with pytest.raises(ptxsim.OutOfBoundsFault, match=r"CTA \(1, 0, 0\).*edited_ptx\.py:\d+"):
            simulate(launch, ptx)


@pytest.mark.parametrize("access", ["ld", "st"])
def test_an_address_off_by_one_element_is_out_of_bounds_or_misaligned(access: str) -> None:
    x, out = torch.randn(33)[1:], torch.zeros(33)[1:]  # not aligned to 16 bytes: accesses of one element
    launch = recorded_launch("sm_80", copy_kernel, (1,), x, out, 32, BLOCK=32)
    simulate(launch)
    pattern = rf"({access}\.global\.\S+ .*\[ %rd\d+ \+) 0 \]"
    for offset in (4, -4):
        for ptx in edits(launch.kernel.asm["ptx"], pattern, rf"\1 {offset} ]"):
            with pytest.raises(ptxsim.OutOfBoundsFault):
                simulate(launch, ptx)
    x, out = torch.randn(1024), torch.zeros(1024)
    launch = recorded_launch("sm_80", copy_kernel, (1,), x, out, 1024, BLOCK=1024)
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
    run(body.format(32), columns, whole[:, 1])  # the tensor in the gaps is passed as well


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


def test_too_little_shared_memory_is_out_of_bounds() -> None:
    product = Product("sm_80", torch.bfloat16)
    arguments = list(product.launch.arguments.values())
    with pytest.raises(ptxsim.OutOfBoundsFault, match="shared-memory"):
        ptxsim.run_ptx(product.ptx, product.launch.kernel.metadata.shared - 16, (1,), arguments)
