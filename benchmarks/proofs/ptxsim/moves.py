"""Moves, selections, comparisons and conversions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from benchmarks.proofs.ptxsim.arithmetic import BITS, INTEGERS, elementwise
from benchmarks.proofs.ptxsim.floats import flushed, from_half, joined, to_half
from benchmarks.proofs.ptxsim.machine import DTYPES, Machine, Mask, Step, instruction
from benchmarks.proofs.ptxsim.memory import Array
from benchmarks.proofs.ptxsim.parse import Instruction, elements


@instruction("mov", f"pred {BITS} {INTEGERS} f32 f64")
def move(machine: Machine, ins: Instruction) -> Step:
    destination, source = ins.operands
    if destination.startswith("{"):
        return _unpack(machine, ins)
    if source.startswith("{"):
        return _pack(machine, ins)
    return elementwise(machine, ins, lambda x: x)


def _unpack(machine: Machine, ins: Instruction) -> Step:
    """`mov.b32 {%rs1, %rs2}, %r1`: the first register gets the lowest bits."""
    writes = [machine.destination(name) for name in elements(ins.operands[0])]
    source = machine.operand(ins.operands[1], ins.type)
    size = DTYPES[ins.type].itemsize // len(writes)

    def step(mask: Mask) -> None:
        parts = np.ascontiguousarray(machine.vector(source())).view(f"u{size}").reshape(-1, len(writes))
        for i, write in enumerate(writes):
            write(np.ascontiguousarray(parts[:, i]), mask)

    return step


def _pack(machine: Machine, ins: Instruction) -> Step:
    """`mov.b32 %r1, {%rs1, %rs2}`."""
    names = elements(ins.operands[1])
    dtype = DTYPES[ins.type]
    sources = [machine.operand(name, f"b{8 * dtype.itemsize // len(names)}") for name in names]
    write = machine.destination(ins.operands[0])

    def step(mask: Mask) -> None:
        parts = np.stack([machine.vector(source()) for source in sources], axis=1)
        write(parts.view(dtype).reshape(-1), mask)

    return step


@instruction("cvta", "to global u64")
@instruction("createpolicy", "fractional b64")
def ignore_space(machine: Machine, ins: Instruction) -> Step:
    """Copy the operand: global addresses equal generic ones. A cache policy may be any number."""
    if ins.opcode == "createpolicy":
        write = machine.destination(ins.operands[0])
        return lambda mask: write(np.zeros((), np.uint64), mask)
    return elementwise(machine, ins, lambda x: x)


@instruction("selp", f"{BITS} {INTEGERS} f32 f64")
def select(machine: Machine, ins: Instruction) -> Step:
    return elementwise(machine, ins, lambda a, b, p: np.asarray(np.where(p, a, b)), ins.type, ins.type, "pred")


_COMPARISONS: dict[str, Callable[..., Array]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
    "num": lambda a, b: ~_unordered(a, b),
    "nan": lambda a, b: _unordered(a, b),
}


def _unordered(a: Array, b: Array) -> Array:
    return np.isnan(a) | np.isnan(b)


@instruction("setp", f"equ neu ltu leu gtu geu {' '.join(_COMPARISONS)} ftz and or xor {BITS} {INTEGERS} f32 f64")
def compare(machine: Machine, ins: Instruction) -> Step:
    """Compare, and combine the result with a predicate. With a NaN a comparison is false, or true if its name ends in u."""
    name, combined, floats = ins.modifiers[0], ins.modifiers[1], ins.type[0] == "f"

    def compared(a: Array, b: Array, *other: Array) -> Array:
        if "ftz" in ins.modifiers:
            a, b = flushed(a), flushed(b)
        if floats and name.endswith("u"):
            result = _COMPARISONS[name[:-1]](a, b) | _unordered(a, b)
        elif floats and name == "ne":
            result = (a != b) & ~_unordered(a, b)
        else:
            result = _COMPARISONS[name](a, b)
        if other:
            return {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[combined](result, *other)
        return result

    return elementwise(machine, ins, compared, *[ins.type, ins.type, "pred"][: len(ins.operands) - 1])


_ROUNDINGS: dict[str, Callable[[Array], Array]] = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@instruction("cvt", f"{' '.join(_ROUNDINGS)} rn ftz u8 s8 {INTEGERS} f16 f32 f64 bf16 bf16x2 f16x2")
def convert(machine: Machine, ins: Instruction) -> Step:
    """Convert to the nearest representable value, unless a rounding to integers is named."""
    to, from_ = ins.modifiers[-2:]
    rounding = next((_ROUNDINGS[m] for m in ins.modifiers if m in _ROUNDINGS), None)
    if to in ("bf16x2", "f16x2"):
        half = to.removesuffix("x2")
        return elementwise(
            machine, ins, lambda high, low: joined(to_half(low, half), to_half(high, half)), from_, from_
        )

    def converted(x: Array) -> Array:
        if from_ in ("f16", "bf16"):
            x = from_half(x, from_)
        if "ftz" in ins.modifiers and from_ == "f32":
            x = flushed(x)
        if rounding:
            x = rounding(x)
        if to in ("f16", "bf16"):
            return to_half(x, to)
        if x.dtype.kind == "f" and DTYPES[to].kind in "iu":
            return _saturated(x, to)
        result = x.astype(DTYPES[to])
        return flushed(result) if "ftz" in ins.modifiers and to == "f32" else result

    return elementwise(machine, ins, converted, from_)


def _saturated(x: Array, to: str) -> Array:
    """Convert an integral float to the nearest integer of a type. NaN becomes 0, or for 64 bits the top bit alone."""
    limits = np.iinfo(DTYPES[to])
    wide = x.astype(np.float64)
    nan = 0 if limits.bits < 64 else -(1 << 63) if limits.min else 1 << 63
    over, under = wide >= float(limits.max), wide <= float(limits.min)
    inside = np.where(over | under | np.isnan(wide), 0, wide).astype(DTYPES[to])
    return np.select(
        [np.isnan(wide), over, under], [np.array(v, DTYPES[to]) for v in (nan, limits.max, limits.min)], inside
    )
