"""Floating-point arithmetic is correctly rounded."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch

from tests.support.handwritten_ptx import Array, by_lane, floats


def assert_nearest(results: Array, exact: list[Fraction]) -> None:
    """Assert that f32 results are nearest to the exact values, and even where a neighbour is equally near."""
    for result, value in zip(results, exact, strict=True):
        error = abs(Fraction(float(result)) - value)
        for towards in (-np.inf, np.inf):
            other = abs(Fraction(float(np.nextafter(result, np.float32(towards)))) - value)
            assert error < other or (error == other and not int(result.view(np.uint32)) & 1), (result, float(value))


def test_fma_rounds_once() -> None:
    rng = np.random.default_rng(0)
    a, b, c = (rng.standard_normal(64).astype(np.float32) for _ in range(3))
    # A sum that lies beside a tie of f32, by less than f64 can tell: below (c is odd), and above (c is even).
    a[0], b[0], c[0] = 1 + 2**-23, 2**-24 * (1 - 2**-23), 1 + 2**-23
    a[1], b[1], c[1] = 1 + 2**-12, 2**-24 * (1 - 2**-12 + 2**-24), 1
    a[2:4], b[2:4], c[2:4] = a[:2], -b[:2], -c[:2]
    result = by_lane("fma.rn.f32 $d, $0, $1, $2;", [a, b, c], "f4")
    exact = ([Fraction(float(v)) for v in x] for x in (a, b, c))
    assert_nearest(result, [x * y + z for x, y, z in zip(*exact, strict=True)])
    # A product that is a tie of bf16, and an addend that f32 would lose.
    numbers = np.array([[1 + 2**-4], [2**-40], [1.125 + 2**-7]], np.float32).repeat(32, axis=1)
    factor, addend, above = (numbers.view(np.uint32) >> 16).astype(np.uint16)
    np.testing.assert_array_equal(by_lane("fma.rn.bf16 $d, $0, $0, $1;", [factor, addend], "u2"), above)


def test_a_nan_that_is_computed_is_always_the_same() -> None:
    """Lanes that compute the same thing must store the same bits."""
    payloads = np.array([0x7FC00000, 0xFFC00001, 0x7F800001, 0xFFFFFFFF] * 8, np.uint32).view(np.float32)
    for body in (
        "add.f32 $d, $0, $1;",
        "mul.f32 $d, $1, $0;",
        "fma.rn.f32 $d, $0, $1, $1;",
        "ex2.approx.ftz.f32 $d, $0;",
    ):
        bits = by_lane(body, [payloads, np.ones(32, np.float32)], "u4")
        np.testing.assert_array_equal(bits, np.full(32, 0x7FFFFFFF))
    np.testing.assert_array_equal(by_lane("cvt.rn.bf16.f32 $d, $0;", [payloads], "u2"), np.full(32, 0x7FFF))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["f16", "bf16"])
@pytest.mark.parametrize("pair", ["", "x2"], ids=["one", "pair"])
def test_half_precision_rounds_each_result_once(dtype: torch.dtype, pair: str) -> None:
    type_ = ("f16" if dtype == torch.float16 else "bf16") + pair
    a, b, c = (torch.randn(128 if pair else 64, generator=torch.Generator().manual_seed(s)).to(dtype) for s in range(3))
    lanes = [np.ascontiguousarray(x.view(torch.int16).numpy()).view("u4" if pair else "u2") for x in (a, b, c)]
    for body, expected in [
        (f"add.{type_} $d, $0, $1;", a.double() + b.double()),
        (f"mul.{type_} $d, $0, $1;", a.double() * b.double()),
        (f"fma.rn.{type_} $d, $0, $1, $2;", a.double() * b.double() + c.double()),
        (f"max.{type_} $d, $0, $1;", torch.maximum(a, b).double()),
    ]:
        result = torch.from_numpy(by_lane(body, lanes, "u4" if pair else "u2").view("i2")).view(dtype)
        ulp = torch.finfo(dtype).eps * 2.0 ** expected.abs().log2().floor().clamp(min=-14)
        assert ((result.double() - expected).abs() <= 0.5 * ulp).all(), body


@pytest.mark.parametrize(
    ("opcode", "model"),
    [
        ("ex2.approx.ftz", np.exp2),
        ("lg2.approx", np.log2),
        ("sqrt.approx.ftz", np.sqrt),
        ("rcp.approx", np.reciprocal),
    ],
)
def test_functions_are_rounded_and_keep_their_limits(opcode: str, model: Callable[[Array], Array]) -> None:
    def flushed(v: Array) -> Array:
        return np.where(np.abs(v) < 2.0**-126, np.copysign(0, v), v) if "ftz" in opcode else v

    x = np.abs(floats(2)) if "sqrt" in opcode or "lg2" in opcode else floats(2)
    with np.errstate(all="ignore"):
        expected = flushed(np.asarray(model(flushed(x).astype(np.float64))).astype(np.float32))
    np.testing.assert_array_equal(by_lane(f"{opcode}.f32 $d, $0;", [x], "f4"), expected)


def test_min_and_max_pass_a_number_over_nan() -> None:
    a, b = np.array([1, np.nan, np.nan, -2] * 8, np.float32), np.array([2, 3, np.nan, np.nan] * 8, np.float32)
    np.testing.assert_array_equal(by_lane("max.f32 $d, $0, $1;", [a, b], "f4"), np.array([2, 3, np.nan, -2] * 8))
    np.testing.assert_array_equal(by_lane("min.f32 $d, $0, $1;", [a, b], "f4"), np.array([1, 3, np.nan, -2] * 8))
    np.testing.assert_array_equal(
        by_lane("max.NaN.f32 $d, $0, $1;", [a, b], "f4"), np.array([2, np.nan, np.nan, np.nan] * 8)
    )
