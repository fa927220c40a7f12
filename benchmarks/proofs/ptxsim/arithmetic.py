"""Instructions on integers, logic and bits."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from benchmarks.proofs.ptxsim.machine import DTYPES, Machine, Mask, Step, instruction
from benchmarks.proofs.ptxsim.memory import Array
from benchmarks.proofs.ptxsim.parse import Instruction

INTEGERS = "u16 s16 u32 s32 u64 s64"
PAIRS = "u16x2 s16x2"
BITS = "b16 b32 b64"


def elementwise(machine: Machine, ins: Instruction, fn: Callable[..., Array], *types: str) -> Step:
    """Apply `fn` to the operands, read as the given types (if none are given, all as the instruction's own)."""
    sources = [
        machine.operand(text, type_)
        for text, type_ in zip(ins.operands[1:], types or [ins.type] * (len(ins.operands) - 1), strict=True)
    ]
    write = machine.destination(ins.operands[0])

    def step(mask: Mask) -> None:
        write(fn(*[source() for source in sources]), mask)

    return step


_LOGIC: dict[str, Callable[..., Array]] = {
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
}


@instruction("and or xor not", f"pred {BITS}")
def logic(machine: Machine, ins: Instruction) -> Step:
    return elementwise(machine, ins, _LOGIC[ins.opcode])


def integer(machine: Machine, ins: Instruction) -> Step:
    """add, sub, min, max, neg, abs, div, rem. floats.py enters them, because opcodes are shared with floats."""
    fn = INTEGER_ARITHMETIC[ins.opcode]
    if ins.type.endswith("x2"):
        half = DTYPES[ins.type.removesuffix("x2")]

        def on_halves(*values: Array) -> Array:
            halves = fn(*(np.atleast_1d(value).view(half).reshape(-1, 2) for value in values))
            return np.ascontiguousarray(halves).view(np.uint32).reshape(-1)

        return elementwise(machine, ins, on_halves)
    return elementwise(machine, ins, fn)


def _quotient(a: Array, b: Array) -> Array:
    """The quotient rounded towards zero, as in C."""
    return (a - np.fmod(a, b)) // b


INTEGER_ARITHMETIC: dict[str, Callable[..., Array]] = {
    "add": np.add,
    "sub": np.subtract,
    "min": np.minimum,
    "max": np.maximum,
    "neg": np.negative,
    "abs": np.abs,
    "div": _quotient,
    "rem": np.fmod,
}


def multiply(machine: Machine, ins: Instruction) -> Step:
    """mul and mad of integers, with the low half, the high half or all of the product."""
    form, type_ = ins.modifiers[0], ins.type
    wide = f"{type_[0]}{2 * int(type_[1:])}"

    def product(a: Array, b: Array) -> Array:
        if form == "lo":
            return a * b
        if form == "wide":
            return a.astype(DTYPES[wide]) * b.astype(DTYPES[wide])
        return high_half(a, b)

    addend = wide if form == "wide" else type_
    if ins.opcode == "mul":
        return elementwise(machine, ins, product)
    return elementwise(machine, ins, lambda a, b, c: product(a, b) + c, type_, type_, addend)


@instruction("mad", f"lo hi wide {INTEGERS}")
def mad(machine: Machine, ins: Instruction) -> Step:
    return multiply(machine, ins)


def high_half(a: Array, b: Array) -> Array:
    """The high half of the product of two integers of the same type."""
    bits = 8 * a.dtype.itemsize
    if bits < 64:
        return (
            a.astype(np.int64) * b.astype(np.int64) >> bits
            if a.dtype.kind == "i"
            else a.astype(np.uint64) * b.astype(np.uint64) >> np.uint64(bits)
        ).astype(a.dtype)
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    x, y = a.astype(np.uint64), b.astype(np.uint64)
    x0, x1, y0, y1 = x & low, x >> shift, y & low, y >> shift
    middle = x1 * y0 + (x0 * y0 >> shift)
    high = x1 * y1 + (middle >> shift) + (x0 * y1 + (middle & low) >> shift)
    if a.dtype.kind == "i":  # subtract what the sign bits added in two's complement
        high = high - np.where(a < 0, y, 0) - np.where(b < 0, x, 0)
    return high.astype(a.dtype)


@instruction("shl shr", f"{BITS} {INTEGERS}")
def shift(machine: Machine, ins: Instruction) -> Step:
    """shl and shr. A shift by more than the width gives zero, or the sign in every bit."""
    bits, dtype = 8 * DTYPES[ins.type].itemsize, DTYPES[ins.type]

    def shifted(x: Array, amount: Array) -> Array:
        within = np.minimum(amount, bits - 1).astype(dtype)
        if ins.opcode == "shr":
            result: Array = x >> within
            return result if dtype.kind == "i" else np.where(amount < bits, result, dtype.type(0))
        return np.where(amount < bits, x << within, dtype.type(0))

    return elementwise(machine, ins, shifted, ins.type, "u32")


@instruction("shf", "l r wrap clamp b32")
def funnel_shift(machine: Machine, ins: Instruction) -> Step:
    """Shift the 64 bits of two registers; the result is the upper half (left shift) or the lower one."""
    direction, mode, _ = ins.modifiers

    def shifted(low: Array, high: Array, amount: Array) -> Array:
        both = high.astype(np.uint64) << np.uint64(32) | low
        by = (amount & np.uint32(31) if mode == "wrap" else np.minimum(amount, 32)).astype(np.uint64)
        result = both << by >> np.uint64(32) if direction == "l" else both >> by
        return np.asarray(result).astype(np.uint32)

    return elementwise(machine, ins, shifted, "u32", "u32", "u32")


@instruction("bfe", "u32 s32 u64 s64")
def extract_field(machine: Machine, ins: Instruction) -> Step:
    """Bits [position, position + length) of the operand. Beyond its end there are zeros, or sign bits if it is signed."""
    dtype = DTYPES[ins.type]
    wide = np.dtype(f"{dtype.kind}8")

    def extracted(x: Array, position: Array, length: Array) -> Array:
        position, length = (np.asarray(v & 0xFF).astype(wide) for v in (position, length))
        unused = 64 - np.clip(length, 1, 64)
        field = x.astype(wide) >> np.minimum(position, 63) << unused >> unused
        nothing = (length == 0) | ((position > 63) & (wide.kind == "u"))
        return np.where(nothing, 0, field).astype(dtype)

    return elementwise(machine, ins, extracted, ins.type, "u32", "u32")


@instruction("bfi", "b32")
def insert_field(machine: Machine, ins: Instruction) -> Step:
    def inserted(field: Array, into: Array, position: Array, length: Array) -> Array:
        position, length = (np.minimum(v & 0xFF, 32).astype(np.uint64) for v in (position, length))
        mask = (((np.uint64(1) << length) - np.uint64(1)) << position).astype(np.uint32)
        placed = (field.astype(np.uint64) << position).astype(np.uint32)
        return into & ~mask | placed & mask

    return elementwise(machine, ins, inserted, "u32", "u32", "u32", "u32")


@instruction("lop3", "b32")
def logic_of_three(machine: Machine, ins: Instruction) -> Step:
    """Any function of three bits, by a table: the value for bits a, b, c is bit 4a + 2b + c."""

    def looked_up(a: Array, b: Array, c: Array, table: Array) -> Array:
        result: Array = a & np.uint32(0)
        for row in range(8):
            if table >> row & 1:
                result = result | (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
        return result

    return elementwise(machine, ins, looked_up, "u32", "u32", "u32", "u32")


@instruction("prmt", "b32")
def permute_bytes(machine: Machine, ins: Instruction) -> Step:
    """Pick one of eight bytes for each nibble of the selector; its top bit asks for the byte's sign eight times."""

    def permuted(a: Array, b: Array, selector: Array) -> Array:
        both = b.astype(np.uint64) << np.uint64(32) | a
        result: Array = np.zeros_like(both)
        for i in range(4):
            nibble = (selector >> np.uint32(4 * i)).astype(np.uint64)
            byte = both >> ((nibble & np.uint64(7)) * np.uint64(8)) & np.uint64(0xFF)
            sign = np.where(byte & np.uint64(0x80), np.uint64(0xFF), np.uint64(0))
            result = result | np.where(nibble & np.uint64(8), sign, byte) << np.uint64(8 * i)
        return result.astype(np.uint32)

    return elementwise(machine, ins, permuted, "u32", "u32", "u32")


@instruction("popc", "b32 b64")
def count_ones(machine: Machine, ins: Instruction) -> Step:
    return elementwise(machine, ins, lambda x: np.bitwise_count(x).astype(np.uint32))


@instruction("clz", "b32 b64")
def count_leading_zeros(machine: Machine, ins: Instruction) -> Step:
    bits = 8 * DTYPES[ins.type].itemsize

    def counted(x: Array) -> Array:
        for by in (1, 2, 4, 8, 16, 32)[: bits.bit_length() - 1]:
            x = x | x >> x.dtype.type(by)  # sets every bit below the highest one
        return (bits - np.bitwise_count(x)).astype(np.uint32)

    return elementwise(machine, ins, counted)
