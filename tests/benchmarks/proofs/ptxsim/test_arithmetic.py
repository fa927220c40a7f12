"""Integer instructions against Python's unbounded integers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from tests.support.handwritten_ptx import Array, by_lane, integers


def wrapped(values: Sequence[int], dtype: str) -> Array:
    bits = np.iinfo(dtype).bits
    return np.array([v & ((1 << bits) - 1) for v in values], f"u{bits // 8}").view(dtype)


def field(x: int, position: int, length: int, signed: bool) -> int:
    """A bit field. Python's integers extend their sign without end, as the manual wants of fields beyond the operand."""
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
        inputs[-1] = np.arange(64).astype(types[-1])  # amounts below, at and beyond the width
    divides = body[:3] in ("div", "rem")
    if divides:  # the manual leaves open what division by zero gives
        inputs[1][inputs[1] == 0] = 7
        inputs[0][inputs[0] == np.iinfo(types[0]).min] = 5
    expected = wrapped([model(*row) for row in zip(*(x.tolist() for x in inputs), strict=True)], result)
    np.testing.assert_array_equal(by_lane(body, inputs, result), expected)
