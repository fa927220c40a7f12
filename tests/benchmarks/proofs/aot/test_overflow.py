"""Overflows of 32 bits in address arithmetic are found, and kernels without one pass."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.proofs.aot.launches import recorded
from benchmarks.proofs.aot.overflow import _BOUNDED, _IF_NOT_NEGATIVE, _WRAPPING, Interval, Overflow, full, overflows

BOUNDS = {"stride": Interval(0, 2**31 - 1), "n": Interval(0, 10**9), "[*]p_index": Interval(0, 10**9)}


@triton.jit
def row_times_stride(p_out, stride):
    tl.store(p_out + tl.program_id(0) * stride, 1.0)


@triton.jit
def wide_row_times_stride(p_out, stride):
    tl.store(p_out + tl.program_id(0).to(tl.int64) * stride, 1.0)


@triton.jit
def widened_too_late(p_out, stride):
    tl.store(p_out + (tl.program_id(0) * stride).to(tl.int64), 1.0)


@triton.jit
def index_times_width(p_out, p_index):
    tl.store(p_out + tl.load(p_index) * 768, 1.0)


@triton.jit
def wide_index_times_width(p_out, p_index):
    tl.store(p_out + tl.load(p_index).to(tl.int64) * 768, 1.0)


@triton.jit
def column_of_block(p_out, n):
    o_col = tl.program_id(1) * 128 + tl.arange(0, 128)
    tl.store(p_out + o_col, 1.0, mask=o_col < n)


@triton.jit
def only_the_mask(p_out, n):
    offset = tl.program_id(0).to(tl.int64) * 128 + tl.arange(0, 128)
    tl.store(p_out + offset, 1.0, mask=tl.program_id(0) * 128 + tl.arange(0, 128) < n)


@triton.jit
def loop_over_rows(p_out, n):
    for start in range(0, n, 128):
        tl.store(p_out + start + tl.arange(0, 128), 1.0)


@triton.jit
def loop_carries_offset(p_out, stride, n):
    offset = 0
    for _ in range(0, n):
        tl.store(p_out + offset, 1.0)
        offset += stride


@triton.jit
def loop_carries_wide_offset(p_out, stride, n):
    offset = tl.full((), 0, tl.int64)
    for _ in range(0, n):
        tl.store(p_out + offset, 1.0)
        offset += stride


@triton.jit
def while_carries_offset(p_out, stride, n):
    offset = 0
    while offset < n:
        tl.store(p_out + offset, 1.0)
        offset += stride


@triton.jit
def after_an_early_return(p_out, stride, n):
    if n == 3:
        return
    tl.store(p_out + n * stride, 1.0)


@triton.jit
def filled_where_masked(p_out, p_index, n):
    row = tl.load(p_index, mask=n > 1, other=2**31 - 1)
    tl.store(p_out + row + 1, 1.0)
    tl.store(p_out + (row + 1), 1.0)


@triton.jit
def counts_down(p_out, n, stride):
    for row in range(n, 0, -1):
        tl.store(p_out + row, 1.0)


@triton.jit
def clamped(p_out, n):
    tl.store(p_out + tl.minimum(n, 1000) * 1000, 1.0)


@triton.jit
def chosen_by_branch(p_out, stride, n):
    rows = 1
    if n > 5:
        rows = n
    tl.store(p_out + rows * 4, 1.0)


@triton.jit
def sum_of_indices(p_out, p_index):
    tl.store(p_out + tl.sum(tl.load(p_index + tl.arange(0, 4)), 0), 1.0)


@triton.jit
def hashed(p_out, n):
    word = (n * 0x2545F491) ^ n
    tl.store(p_out + (word & 1023), 1.0)


@triton.jit
def value_not_address(p_out, p_index):
    tl.store(p_index, tl.load(p_index) * 768)


@triton.jit
def _twice(x):
    return x * 2


@triton.jit
def in_a_call(p_out, stride):
    tl.store(p_out + _twice(stride), 1.0)


def found(kernel: Any, bounds: dict[str, Interval] | None = None) -> list[Overflow]:
    values = {"p_out": torch.empty(16), "p_index": torch.empty(4, dtype=torch.int32), "stride": 48, "n": 48}
    with recorded("sm_90") as launches:
        kernel[(1,)](*[values[name] for name in kernel.arg_names])
    return overflows(launches[0].kernel.asm["ttir"], BOUNDS if bounds is None else bounds)


@pytest.mark.parametrize(
    "kernel",
    [
        row_times_stride,
        widened_too_late,
        index_times_width,
        only_the_mask,
        loop_carries_offset,
        while_carries_offset,
        chosen_by_branch,
        after_an_early_return,
        filled_where_masked,
        sum_of_indices,
        in_a_call,
    ],
    ids=lambda kernel: kernel.__name__,
)
def test_an_overflow_is_found(kernel: Any) -> None:
    assert found(kernel)


@pytest.mark.parametrize(
    "kernel",
    [
        wide_row_times_stride,
        wide_index_times_width,
        column_of_block,
        loop_over_rows,
        loop_carries_wide_offset,
        counts_down,
        clamped,
        hashed,
        value_not_address,
    ],
    ids=lambda kernel: kernel.__name__,
)
def test_a_kernel_that_cannot_overflow_passes(kernel: Any) -> None:
    assert found(kernel) == []


def test_an_overflow_has_its_source_line_and_interval() -> None:
    (overflow,) = found(row_times_stride)
    assert overflow.kernel == "row_times_stride"
    assert overflow.line.endswith(f"{__file__.rpartition('/')[2]}:{row_times_stride.starting_line_number + 1 + 1}")
    assert overflow.interval == Interval(0, (2**31 - 2) * (2**31 - 1))


@pytest.mark.parametrize("kernel", [loop_over_rows, clamped], ids=lambda kernel: kernel.__name__)
def test_an_integer_without_a_bound_may_be_anything(kernel: Any) -> None:
    assert found(kernel, {})


def test_a_stated_bound_of_the_grid_replaces_cudas() -> None:
    bounds = {"stride": Interval(0, 2**16), "program_id(x)": Interval(0, 2**10)}
    assert found(row_times_stride, bounds) == []


intervals = st.tuples(st.integers(-40, 40), st.integers(0, 12)).map(lambda x: Interval(x[0], x[0] + x[1]))
OPERATIONS: dict[str, Any] = {
    "arith.addi": lambda a, b: a + b,
    "arith.subi": lambda a, b: a - b,
    "arith.muli": lambda a, b: a * b,
    "arith.minsi": min,
    "arith.maxsi": max,
    "arith.divsi": lambda a, b: int(a / b),
    "arith.remsi": lambda a, b: a - int(a / b) * b,
    "arith.ceildivsi": lambda a, b: -(-a // b),
    "arith.ori": lambda a, b: a | b,
}


@pytest.mark.parametrize("name", OPERATIONS)
@given(a=intervals, b=intervals)
def test_intervals_hold_every_result(name: str, a: Interval, b: Interval) -> None:
    if "div" in name or "rem" in name:
        b = Interval(abs(b.low) + 1, abs(b.low) + 1 + b.high - b.low)
    if name in _IF_NOT_NEGATIVE:
        a, b = (Interval(abs(x.low), abs(x.low) + x.high - x.low) for x in (a, b))
    result = (_WRAPPING | _BOUNDED | _IF_NOT_NEGATIVE)[name](a, b)
    values = [OPERATIONS[name](x, y) for x in range(a.low, a.high + 1) for y in range(b.low, b.high + 1)]
    assert result.low <= min(values)
    assert max(values) <= result.high


def test_full_is_the_range_of_a_signed_type() -> None:
    assert full(32) == Interval(-(2**31), 2**31 - 1)
