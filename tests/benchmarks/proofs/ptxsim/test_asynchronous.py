"""Data of asynchronous copies and products must be waited for."""

from __future__ import annotations

import pytest
import torch

from benchmarks.proofs import ptxsim
from tests.support.compiled_kernels import needs_compiler
from tests.support.edited_ptx import TARGETS, Product, edits
from tests.support.handwritten_ptx import run

pytestmark = needs_compiler


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


@pytest.mark.parametrize("target", TARGETS)
def test_copies_must_be_waited_for(target: str) -> None:
    """Leaving out a wait is a fault, or the wait was not needed; wrong numbers never result."""
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
