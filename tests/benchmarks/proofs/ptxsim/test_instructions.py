"""Every family of instructions that the simulator knows, against a model of its own in Python or PyTorch."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from tests.support.handwritten_ptx import run

Array = npt.NDArray[Any]


def by_lane(body: str, inputs: Sequence[Array], result: str) -> Array:
    """What `body` makes, for each lane, of its element of each input: `$0`, `$1`, ..., into `$d`."""
    prefix = {1: "%rs", 2: "%rs", 4: "%r", 8: "%rd"}
    names = [f"{prefix[x.itemsize]}{i}" for i, x in enumerate(inputs)]
    out = np.zeros(len(inputs[0]), result)
    code = []
    for i, x in enumerate([*inputs, out]):
        code.append(f"mul.wide.u32 %rd20, %r99, {x.itemsize}; add.s64 %rd{21 + i}, %rd20, %rd{10 + i};")
    for i, (name, x) in enumerate(zip(names, inputs, strict=True)):
        code.append(f"ld.global.b{8 * x.itemsize} {name}, [%rd{21 + i}];")
    destination = f"{prefix[out.itemsize]}9"
    code.append(re.sub(r"\$(\w)", lambda m: destination if m[1] == "d" else names[int(m[1])], body))
    code.append(f"st.global.b{8 * out.itemsize} [%rd{21 + len(inputs)}], {destination};")
    tensors = [torch.from_numpy(x.view(f"i{x.itemsize}")) for x in (*inputs, out)]
    run("\n".join(code), *tensors, threads=len(out))
    return out


def integers(dtype: str, seed: int) -> Array:
    """64 integers, the limits among them."""
    info = np.iinfo(dtype)
    edges = [0, 1, 2, info.max, info.max - 1, info.min, info.min + 1, info.max // 2]
    rng = np.random.default_rng(seed)
    random = rng.integers(info.min, info.max, 64, dtype, endpoint=True) >> rng.integers(0, info.bits, 64).astype(dtype)
    return np.concatenate([np.array(edges, dtype), random])[rng.permutation(64)]


def wrapped(values: Sequence[int], dtype: str) -> Array:
    bits = np.iinfo(dtype).bits
    return np.array([v & ((1 << bits) - 1) for v in values], f"u{bits // 8}").view(dtype)


def field(x: int, position: int, length: int, signed: bool) -> int:
    """Python's integers extend their sign without end, which is what the manual says of fields beyond the operand."""
    value = x >> position & ((1 << length) - 1)
    return value - (1 << length) if signed and length and value >> (length - 1) else value


def permuted(a: int, b: int, selector: int) -> int:
    source = (a | b << 32).to_bytes(8, "little")
    result = []
    for i in range(4):
        nibble = selector >> 4 * i & 15
        byte = source[nibble & 7]
        result.append((255 if byte & 128 else 0) if nibble & 8 else byte)
    return int.from_bytes(bytes(result), "little")


def truncated_quotient(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1) if b else 0


def per_bit(table: int) -> Callable[[int, int, int], int]:
    return lambda a, b, c: sum(
        (table >> ((a >> i & 1) * 4 + (b >> i & 1) * 2 + (c >> i & 1)) & 1) << i for i in range(32)
    )


INTEGER_INSTRUCTIONS: list[tuple[str, list[str], str, Callable[..., int]]] = [
    ("add.s32 $d, $0, $1;", ["i4", "i4"], "i4", lambda a, b: a + b),
    ("sub.s64 $d, $0, $1;", ["i8", "i8"], "i8", lambda a, b: a - b),
    ("neg.s32 $d, $0;", ["i4"], "i4", lambda a: -a),
    ("abs.s32 $d, $0;", ["i4"], "i4", abs),
    ("min.s32 $d, $0, $1;", ["i4", "i4"], "i4", min),
    ("max.u32 $d, $0, $1;", ["u4", "u4"], "u4", max),
    ("not.b32 $d, $0;", ["u4"], "u4", lambda a: ~a),
    ("mul.lo.s32 $d, $0, $1;", ["i4", "i4"], "i4", lambda a, b: a * b),
    ("mul.lo.u64 $d, $0, $1;", ["u8", "u8"], "u8", lambda a, b: a * b),
    ("mul.hi.u32 $d, $0, $1;", ["u4", "u4"], "u4", lambda a, b: a * b >> 32),
    ("mul.hi.s32 $d, $0, $1;", ["i4", "i4"], "i4", lambda a, b: a * b >> 32),
    ("mul.hi.u64 $d, $0, $1;", ["u8", "u8"], "u8", lambda a, b: a * b >> 64),
    ("mul.hi.s64 $d, $0, $1;", ["i8", "i8"], "i8", lambda a, b: a * b >> 64),
    ("mul.wide.u32 $d, $0, $1;", ["u4", "u4"], "u8", lambda a, b: a * b),
    ("mul.wide.s32 $d, $0, $1;", ["i4", "i4"], "i8", lambda a, b: a * b),
    ("mul.wide.s16 $d, $0, $1;", ["i2", "i2"], "i4", lambda a, b: a * b),
    ("mad.lo.s32 $d, $0, $1, $2;", ["i4", "i4", "i4"], "i4", lambda a, b, c: a * b + c),
    ("mad.wide.s32 $d, $0, $1, $2;", ["i4", "i4", "i8"], "i8", lambda a, b, c: a * b + c),
    ("mad.hi.u32 $d, $0, $1, $2;", ["u4", "u4", "u4"], "u4", lambda a, b, c: (a * b >> 32) + c),
    ("shl.b32 $d, $0, $1;", ["u4", "u4"], "u4", lambda a, n: a << n if n < 32 else 0),
    ("shl.b64 $d, $0, 63;", ["u8"], "u8", lambda a: a << 63),
    ("shr.u32 $d, $0, $1;", ["u4", "u4"], "u4", lambda a, n: a >> min(n, 32)),
    ("shr.s32 $d, $0, $1;", ["i4", "u4"], "i4", lambda a, n: a >> min(n, 32)),
    ("shr.s64 $d, $0, 200;", ["i8"], "i8", lambda a: a >> 64),
    ("shf.l.wrap.b32 $d, $0, $1, $2;", ["u4"] * 3, "u4", lambda a, b, n: (b << 32 | a) << (n & 31) >> 32),
    ("shf.r.wrap.b32 $d, $0, $1, $2;", ["u4"] * 3, "u4", lambda a, b, n: (b << 32 | a) >> (n & 31)),
    ("shf.r.clamp.b32 $d, $0, $1, $2;", ["u4"] * 3, "u4", lambda a, b, n: (b << 32 | a) >> min(n, 32)),
    ("bfe.u32 $d, $0, 5, 9;", ["u4"], "u4", lambda a: field(a, 5, 9, False)),
    ("bfe.u32 $d, $0, 28, 9;", ["u4"], "u4", lambda a: a >> 28),
    ("bfe.s32 $d, $0, 5, 9;", ["i4"], "i4", lambda a: field(a, 5, 9, True)),
    ("bfe.s32 $d, $0, 30, 9;", ["i4"], "i4", lambda a: a >> 30),
    ("bfe.s32 $d, $0, 3, 0;", ["i4"], "i4", lambda a: 0),
    ("bfe.s64 $d, $0, 16, 16;", ["i8"], "i8", lambda a: field(a, 16, 16, True)),
    ("bfe.u64 $d, $0, 0, 64;", ["u8"], "u8", lambda a: a),
    ("bfi.b32 $d, $0, $1, 7, 11;", ["u4", "u4"], "u4", lambda a, b: b & ~(2047 << 7) | (a & 2047) << 7),
    ("bfi.b32 $d, $0, $1, 0, 32;", ["u4", "u4"], "u4", lambda a, b: a),
    ("lop3.b32 $d, $0, $1, $2, 0x96;", ["u4"] * 3, "u4", lambda a, b, c: a ^ b ^ c),
    ("lop3.b32 $d, $0, $1, $2, 0x6A;", ["u4"] * 3, "u4", per_bit(0x6A)),
    ("prmt.b32 $d, $0, $1, $2;", ["u4"] * 3, "u4", permuted),
    ("popc.b32 $d, $0;", ["u4"], "u4", int.bit_count),
    ("popc.b64 $d, $0;", ["u8"], "u4", int.bit_count),
    ("clz.b32 $d, $0;", ["u4"], "u4", lambda a: 32 - a.bit_length()),
    ("clz.b64 $d, $0;", ["u8"], "u4", lambda a: 64 - a.bit_length()),
    ("div.s32 $d, $0, $1;", ["i4", "i4"], "i4", truncated_quotient),
    ("rem.s32 $d, $0, $1;", ["i4", "i4"], "i4", lambda a, b: a - b * truncated_quotient(a, b) if b else 0),
    ("div.u32 $d, $0, $1;", ["u4", "u4"], "u4", truncated_quotient),
    ("cvt.s64.s32 $d, $0;", ["i4"], "i8", lambda a: a),
    ("cvt.u64.u32 $d, $0;", ["u4"], "u8", lambda a: a),
    ("cvt.u32.u64 $d, $0;", ["u8"], "u4", lambda a: a),
    ("cvt.s32.s8 $d, $0;", ["i2"], "i4", lambda a: (a + 128) % 256 - 128),
    ("mov.b64 $d, {$0, $1};", ["u4", "u4"], "u8", lambda a, b: b << 32 | a),
    ("mov.b32 {%rs20, %rs21}, $0; mov.b32 $d, {%rs21, %rs20};", ["u4"], "u4", lambda a: a >> 16 | (a & 0xFFFF) << 16),
    ("selp.b32 $d, $0, $1, %p0;", ["u4", "u4"], "u4", lambda a, b: a),  # %p0 was never written: true
    ("add.s16x2 $d, $0, $1;", ["u4", "u4"], "u4",
     lambda a, b: (a + b) & 0xFFFF | ((a >> 16) + (b >> 16) & 0xFFFF) << 16),
]  # fmt: skip


@pytest.mark.parametrize(("body", "types", "result", "model"), INTEGER_INSTRUCTIONS, ids=lambda x: str(x).split(" ")[0])
def test_integer_instructions_agree_with_unbounded_integers(
    body: str, types: list[str], result: str, model: Callable[..., int]
) -> None:
    inputs = [integers(dtype, seed) for seed, dtype in enumerate(types)]
    if "$1" in body and body[:3] in ("shl", "shr", "shf"):
        inputs[-1] = np.arange(64).astype(types[-1])  # amounts below, at, and beyond the width
    divides = body[:3] in ("div", "rem")
    if divides:  # what division by zero gives, the manual leaves open
        inputs[1][inputs[1] == 0] = 7
        inputs[0][inputs[0] == np.iinfo(types[0]).min] = 5
    expected = wrapped([model(*row) for row in zip(*(x.tolist() for x in inputs), strict=True)], result)
    np.testing.assert_array_equal(by_lane(body, inputs, result), expected)


FLOATS = [
    0.0,
    -0.0,
    1.0,
    -1.5,
    0.1,
    3e38,
    -3e38,
    1e-39,
    65519.9,
    65520.0,
    2.5,
    -3.5,
    1e10,
    -1e10,
    np.inf,
    -np.inf,
    np.nan,
]


def floats(seed: int) -> Array:
    rng = np.random.default_rng(seed)
    random = rng.standard_normal(64) * 10.0 ** rng.integers(-6, 7, 64)
    return np.concatenate([FLOATS, random])[:64][rng.permutation(64)].astype(np.float32)


def assert_nearest(results: Array, exact: list[Fraction]) -> None:
    """Of f32 numbers: no neighbour is nearer, and of two equally near the even one is taken."""
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
def test_comparisons_know_nan(comparison: str) -> None:
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


@pytest.mark.parametrize("width", [32, 8])
@pytest.mark.parametrize(("mode", "by"), [("bfly", 5), ("up", 3), ("down", 3), ("idx", 6)])
def test_shuffles_stay_within_their_segment(mode: str, by: int, width: int) -> None:
    x = integers("u4", 0)
    clamp = (32 - width) << 8 | (0 if mode == "up" else 31)
    expected = x.copy()
    for lane in range(64):
        within, start = lane % width, lane // width * width
        partner = {"bfly": within ^ by, "up": within - by, "down": within + by, "idx": by}[mode]
        if 0 <= partner < width:
            expected[lane] = x[start + partner]
    np.testing.assert_array_equal(by_lane(f"shfl.sync.{mode}.b32 $d, $0, {by}, {clamp}, -1;", [x], "u4"), expected)


def test_votes_and_reductions_are_of_a_warp() -> None:
    x = integers("u4", 3)
    warps = x.reshape(2, 32)
    body = "setp.gt.u32 %p1, $0, 1000; vote.sync.ballot.b32 $d, %p1, -1;"
    ballots = [sum(int(v > 1000) << i for i, v in enumerate(warp)) for warp in warps]
    np.testing.assert_array_equal(by_lane(body, [x], "u4"), np.repeat(ballots, 32))
    for name, fn in (("add", np.add), ("max", np.maximum), ("or", np.bitwise_or)):
        result = by_lane(f"redux.sync.{name}.u32 $d, $0, -1;", [x], "u4")
        np.testing.assert_array_equal(result, np.repeat(fn.reduce(warps, axis=1).astype("u4"), 32))


def test_atomics_see_each_other() -> None:
    total, top = torch.zeros(1), torch.zeros(1, dtype=torch.int32)
    before, swapped = torch.zeros(128, dtype=torch.int32), torch.zeros(128, dtype=torch.int32)
    body = """mov.u32 %r1, %ctaid.x; mad.lo.s32 %r1, %r1, 64, %r99; cvt.rn.f32.u32 %r2, %r1;
    mad.wide.u32 %rd1, %r1, 4, %rd12; mad.wide.u32 %rd2, %r1, 4, %rd13;
    atom.global.gpu.acq_rel.add.f32 %r3, [%rd10], %r2; cvt.rni.s32.f32 %r3, %r3; st.global.b32 [%rd1], %r3;
    red.global.gpu.relaxed.max.s32 [%rd11], %r1; atom.global.gpu.relaxed.cas.b32 %r4, [%rd11], 127, 500;
    st.global.b32 [%rd2], %r4;"""
    run(body, total, top, before, swapped, threads=64, ctas=2)
    assert total.item() == sum(range(128))
    found = sorted(zip(before.tolist(), range(128), strict=True))  # each lane adds its number to what it finds
    assert all(now + lane == later for (now, lane), (later, _) in itertools.pairwise(found))
    assert top.item() == 500
    assert (swapped == 127).sum() == 1  # of all that compared, one found the number it was looking for


def fragment(matrix: Array) -> list[Array]:
    """Registers, as bits, of a row-major operand of mma.sync [16 or 8, 32 bytes], from the manual's figures.

    Lane 4g + t holds the t-th word of each 16 bytes of rows g and g + 8: the rows of a half first, then the other half.
    """
    rows = len(matrix)
    words = matrix.view(np.int32).reshape(rows, 2, 4)
    places = [(row, half) for half in (0, 1) for row in range(0, rows, 8)]
    return [np.array([words[row + lane // 4, half, lane % 4] for lane in range(32)]) for row, half in places]


def accumulator_places(register: int) -> tuple[list[int], list[int]]:
    """Row and column of each lane's element of D (or C) [16, 8]."""
    lanes = range(32)
    return [lane // 4 + 8 * (register // 2) for lane in lanes], [2 * (lane % 4) + register % 2 for lane in lanes]


@pytest.mark.parametrize(
    ("k", "type_", "dtype"),
    [(16, "bf16", torch.bfloat16), (16, "f16", torch.float16), (8, "tf32", torch.float32)],
    ids=["bf16", "f16", "tf32"],
)
def test_mma_is_a_matrix_product(k: int, type_: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, k, generator=generator).bfloat16().to(dtype) for n in (16, 8))  # b is transposed
    c = torch.randn(16, 8, generator=generator)
    words = torch.int32 if dtype == torch.float32 else torch.int16
    operands = [*fragment(a.view(words).numpy()), *fragment(b.view(words).numpy())]
    addends = [c[accumulator_places(i)].view(torch.int32).numpy() for i in range(4)]
    table, out = torch.from_numpy(np.stack([*operands, *addends])), torch.zeros(4, 32)
    loads = "".join(f"ld.global.b32 %r{i}, [%rd1+{128 * i}];" for i in range(10))
    stores = "".join(f"st.global.b32 [%rd2+{128 * i}], %r{20 + i};" for i in range(4))
    registers = "{%r20,%r21,%r22,%r23}, {%r0,%r1,%r2,%r3}, {%r4,%r5}, {%r6,%r7,%r8,%r9}"
    product = f"mma.sync.aligned.m16n8k{k}.row.col.f32.{type_}.{type_}.f32 {registers};"
    run(f"mad.wide.u32 %rd1, %r99, 4, %rd10; mad.wide.u32 %rd2, %r99, 4, %rd11; {loads} {product} {stores}", table, out)
    result = torch.empty(16, 8)
    for i in range(4):
        result[accumulator_places(i)] = out[i]
    torch.testing.assert_close(result.double(), a.double() @ b.double().T + c, rtol=1e-6, atol=1e-5)
