"""Floating-point instructions, and the opcodes that integers and floats share.

Results are correctly rounded, also where the hardware approximates (ex2, lg2, rcp, rsqrt, sqrt, div.full, sin, cos).
There a GPU may differ by the few units in the last place that the PTX manual allows.
"""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np

from benchmarks.proofs.ptxsim.arithmetic import INTEGERS, PAIRS, elementwise, integer, multiply
from benchmarks.proofs.ptxsim.machine import Machine, Step, instruction
from benchmarks.proofs.ptxsim.memory import Array
from benchmarks.proofs.ptxsim.parse import Instruction

FLOATS = "f16 f32 f64 bf16 f16x2 bf16x2"
_BF16 = np.dtype(ml_dtypes.bfloat16)
_SMALLEST_NORMAL = np.finfo(np.float32).smallest_normal


def from_half(bits: Array, type_: str) -> Array:
    """Convert bits of f16 or bf16 to f32."""
    if type_ == "f16":
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def joined(low: Array, high: Array) -> Array:
    """Two halves of 16 bits in one word of 32."""
    return high.astype(np.uint32) << np.uint32(16) | low


def to_half(value: Array, type_: str) -> Array:
    """Bits of the nearest f16 or bf16."""
    if type_ == "f16":
        bits = value.astype(np.float16).view(np.uint16)
    else:
        bits = (_to_odd_f32(value) if value.dtype == np.float64 else value).astype(_BF16).view(np.uint16)
    return np.where(np.isnan(value), np.uint16(0x7FFF), bits)


def _to_odd_f32(value: Array) -> Array:
    """Round f64 to f32, to odd (see `exact_fma`), because ml_dtypes converts f64 to bf16 through f32."""
    narrow = np.asarray(value.astype(np.float32))
    error, bits = value - narrow, narrow.view(np.int32)
    away_from_zero = (error > 0) == (value > 0)
    moved = np.where(np.isfinite(error) & (error != 0) & (bits & 1 == 0), np.where(away_from_zero, 1, -1), 0)
    return (bits + moved).astype(np.int32).view(np.float32)


def canonical(value: Array) -> Array:
    """Replace every NaN by the one that instructions make, so that lanes that compute the same store the same bits."""
    nan = np.isnan(value)
    return np.where(nan, np.uint32(0x7FFFFFFF).view(np.float32), value) if nan.any() else value


def flushed(value: Array) -> Array:
    """Set subnormal f32 to zero of the same sign."""
    return np.where(np.abs(value) < _SMALLEST_NORMAL, np.copysign(np.float32(0), value), value)


def floating(machine: Machine, ins: Instruction, fn: Callable[..., Array]) -> Step:
    """Apply `fn` in f32 or f64. Half precision is widened first, and the result rounded once."""
    type_ = ins.type
    if type_.endswith("x2"):
        half = type_.removesuffix("x2")

        def on_pairs(*pairs: Array) -> Array:
            halves = [(pair.astype(np.uint16), (pair >> np.uint32(16)).astype(np.uint16)) for pair in pairs]
            low, high = (fn(*(from_half(x, half) for x in values)) for values in zip(*halves, strict=True))
            return joined(to_half(low, half), to_half(high, half))

        return elementwise(machine, ins, on_pairs)
    if type_ in ("f16", "bf16"):
        return elementwise(
            machine,
            ins,
            lambda *v: to_half(fn(*(from_half(x, type_) for x in v)), type_),
            *["u16"] * (len(ins.operands) - 1),
        )
    if type_ == "f64":
        return elementwise(machine, ins, fn)
    if "ftz" in ins.modifiers:
        return elementwise(machine, ins, lambda *v: canonical(flushed(fn(*map(flushed, v)))))
    return elementwise(machine, ins, lambda *v: canonical(fn(*v)))


_ARITHMETIC: dict[str, Callable[..., Array]] = {
    "add": np.add,
    "sub": np.subtract,
    "min": np.fmin,  # prefers the number to a NaN
    "max": np.fmax,
    "neg": np.negative,
    "abs": np.abs,
    "div": np.divide,
}


@instruction("add sub min max neg abs div", f"rn ftz full approx NaN {INTEGERS} {PAIRS} {FLOATS}")
def arithmetic(machine: Machine, ins: Instruction) -> Step:
    if ins.type in f"{INTEGERS} {PAIRS}".split():
        return integer(machine, ins)
    if "NaN" in ins.modifiers:
        return floating(machine, ins, {"min": np.minimum, "max": np.maximum}[ins.opcode])
    return floating(machine, ins, _ARITHMETIC[ins.opcode])


@instruction("rem", INTEGERS)
def remainder(machine: Machine, ins: Instruction) -> Step:
    return integer(machine, ins)


@instruction("mul", f"lo hi wide rn ftz {INTEGERS} {FLOATS}")
def product(machine: Machine, ins: Instruction) -> Step:
    if ins.type in INTEGERS.split():
        return multiply(machine, ins)
    return floating(machine, ins, np.multiply)


@instruction("fma", f"rn ftz {FLOATS}")
def fused_multiply_add(machine: Machine, ins: Instruction) -> Step:
    if ins.type == "f32":
        return floating(machine, ins, lambda a, b, c: exact_fma(a, b, c).astype(np.float32))
    return floating(machine, ins, double_fma if ins.type == "f64" else exact_fma)


def exact_fma(a: Array, b: Array, c: Array) -> Array:
    """a * b + c of f32 numbers in f64, such that rounding it to f32 or less gives the correctly rounded result.

    The product is exact in f64, but the sum is not. Rounding it again goes wrong where the first rounding lands on a
    tie of the second. There the sum is moved to its odd neighbour on the side of the exact value ("rounding to odd").
    """
    wide = a.astype(np.float64) * b
    total: Array = np.asarray(wide + c)
    bits = total.view(np.int64)
    if not (suspect := (bits & 0xFFFFFFF) == 0).any():
        return total
    back = total - wide
    error = (wide - (total - back)) + (c - back)
    inexact = suspect & np.isfinite(error) & (error != 0)
    away_from_zero = (error > 0) == (total > 0)
    return np.where(inexact, bits + np.where(away_from_zero, 1, -1), bits).view(np.float64)


def double_fma(a: Array, b: Array, c: Array) -> Array:
    """a * b + c in f64 with the rounding errors of product and sum added: correct except for ties within about 2^-50."""
    product = a * b
    (a_high, a_low), (b_high, b_low) = _split(a), _split(b)
    product_error = ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low
    total = product + c
    back = total - product
    error = (product - (total - back)) + (c - back) + product_error
    return np.where(np.isfinite(error), total + error, total)


def _split(x: Array) -> tuple[Array, Array]:
    """Split numbers into the upper and the lower half of their mantissas (Veltkamp)."""
    scaled = x * (2.0**27 + 1)
    high = scaled - (scaled - x)
    return high, x - high


_FUNCTIONS: dict[str, Callable[[Array], Array]] = {
    "ex2": np.exp2,
    "lg2": np.log2,
    "rcp": lambda x: 1 / x,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
}


@instruction(" ".join(_FUNCTIONS), "approx rn ftz f32 f64")
def function(machine: Machine, ins: Instruction) -> Step:
    fn = _FUNCTIONS[ins.opcode]
    return floating(machine, ins, lambda x: np.asarray(fn(x.astype(np.float64))).astype(x.dtype))
