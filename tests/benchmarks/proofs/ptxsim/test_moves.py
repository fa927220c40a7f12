"""Conversions, comparisons and predicates."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from tests.support.handwritten_ptx import Array, by_lane, floats


def test_conversions_round_to_nearest_even() -> None:
    x = floats(0)
    x[:4] = [1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11]  # ties of bf16, of f16
    for type_, dtype in (("bf16", torch.bfloat16), ("f16", torch.float16)):
        expected = torch.from_numpy(x).to(dtype)
        single = torch.from_numpy(by_lane(f"cvt.rn.{type_}.f32 $d, $0;", [x], "i2")).view(dtype)
        pair = by_lane(f"cvt.rn.{type_}x2.f32 $d, $0, $1;", [x, x[::-1].copy()], "i4").view("i2").reshape(-1, 2)
        back = torch.from_numpy(by_lane(f"cvt.f32.{type_} $d, $0;", [expected.view(torch.int16).numpy()], "f4"))
        for result in (single, torch.from_numpy(pair[:, 1].copy()).view(dtype)):  # the first operand is the upper half
            torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(back, expected.float(), rtol=0, atol=0, equal_nan=True)
        assert torch.equal(torch.from_numpy(pair[::-1, 0].copy()).view(dtype).nan_to_num(0.1), expected.nan_to_num(0.1))


@pytest.mark.parametrize(
    ("rounding", "model"),
    [("rni", round), ("rzi", int), ("rmi", lambda x: x.__floor__()), ("rpi", lambda x: x.__ceil__())],
)
@pytest.mark.parametrize(("to", "result"), [("s32", "i4"), ("u32", "u4"), ("u16", "u2"), ("s64", "i8")])
def test_floats_become_integers_in_every_rounding_and_saturate(
    rounding: str, model: Callable[[float], int], to: str, result: str
) -> None:
    x, limits = floats(1), np.iinfo(result)
    nan = 0 if limits.bits < 64 else limits.min

    def expected(value: float) -> int:
        if np.isnan(value):
            return nan
        return max(limits.min, min(limits.max, model(value) if np.isfinite(value) else int(np.sign(value)) << 99))

    np.testing.assert_array_equal(
        by_lane(f"cvt.{rounding}.{to}.f32 $d, $0;", [x], result), np.array([expected(v) for v in x.tolist()], result)
    )


ORDERED: dict[str, Callable[..., Array]] = {
    "eq": np.equal,
    "ne": lambda a, b: (a < b) | (a > b),
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "num": lambda a, b: a == a,
}


UNORDERED = {"nan": lambda a, b: a < a, **{f"{name}u": fn for name, fn in ORDERED.items() if name != "num"}}


@pytest.mark.parametrize("comparison", [*ORDERED, *UNORDERED])
def test_comparisons_with_nan_are_false_or_true_by_name(comparison: str) -> None:
    a = np.array([1, 2, 2, np.nan, 1, np.nan, 0, -np.inf] * 4, np.float32)
    b = np.array([2, 1, 2, 1, np.nan, np.nan, -0.0, 0] * 4, np.float32)
    nan = np.isnan(a) | np.isnan(b)
    expected = ORDERED[comparison](a, b) & ~nan if comparison in ORDERED else UNORDERED[comparison](a, b) | nan
    body = f"setp.{comparison}.f32 %p1, $0, $1; selp.b32 $d, 1, 0, %p1;"
    np.testing.assert_array_equal(by_lane(body, [a, b], "u4"), expected)


def test_predicates_combine_and_guard() -> None:
    a = np.arange(32, dtype=np.uint32)
    body = """setp.lt.u32 %p1, $0, 20; setp.ge.and.u32 %p2, $0, 10, %p1; xor.pred %p3, %p1, %p2; not.pred %p4, %p3;
    mov.b32 $d, 7; @%p2 add.s32 $d, $0, 100; @!%p1 mov.b32 $d, 0; and.pred %p5, %p4, %p1; @%p5 add.s32 $d, $d, 1;"""
    expected = np.where((a >= 10) & (a < 20), a + 101, np.where(a < 20, 7, 0))
    np.testing.assert_array_equal(by_lane(body, [a], "u4"), expected)
