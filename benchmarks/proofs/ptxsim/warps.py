"""Instructions of whole warps, and fences."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from benchmarks.proofs.ptxsim.arithmetic import elementwise
from benchmarks.proofs.ptxsim.machine import Machine, Mask, Step, instruction
from benchmarks.proofs.ptxsim.memory import Array
from benchmarks.proofs.ptxsim.parse import Instruction


@instruction("shfl", "sync bfly idx up down b32")
def shuffle(machine: Machine, ins: Instruction) -> Step:
    """Let each lane read another lane's register. A lane whose partner would be outside of its segment reads its own."""
    name, _, valid = (part.strip() for part in ins.operands[0].partition("|"))
    write, write_valid = machine.destination(name), machine.destination(valid or "_")
    source, by, bounds = (machine.operand(text, "u32") for text in ins.operands[1:4])
    mode = ins.modifiers[1]

    def step(mask: Mask) -> None:
        machine.whole(mask)
        shift, bound = (machine.vector(operand()).astype(np.int64) for operand in (by, bounds))
        lane = np.arange(machine.lanes) % 32
        segment, clamp = bound >> 8 & 31, bound & 31
        lowest, highest = lane & segment, lane & segment | clamp & ~segment
        partner = {
            "bfly": lane ^ shift,
            "idx": lowest | shift & ~segment & 31,
            "up": lane - shift,
            "down": lane + shift,
        }[mode]
        inside = partner >= highest if mode == "up" else partner <= highest
        partner = np.where(inside, partner, lane) + np.arange(machine.lanes) // 32 * 32
        write(machine.vector(source())[partner], mask)
        write_valid(inside, mask)

    return step


_REDUCTIONS: dict[str, Callable[..., Array]] = {
    "add": np.add.reduce,
    "min": np.minimum.reduce,
    "max": np.maximum.reduce,
    "and": np.bitwise_and.reduce,
    "or": np.bitwise_or.reduce,
    "xor": np.bitwise_xor.reduce,
}


@instruction("redux", f"sync {' '.join(_REDUCTIONS)} b32 u32 s32")
def reduce_warp(machine: Machine, ins: Instruction) -> Step:
    fn = _REDUCTIONS[ins.modifiers[1]]

    def reduced(x: Array, members: Array) -> Array:
        if (members != 0xFFFFFFFF).any():
            raise NotImplementedError(f"PTX reduction over a part of a warp: {ins}")
        return np.repeat(fn(machine.vector(x).reshape(-1, 32), axis=1).astype(x.dtype), 32)

    return elementwise(machine, ins, reduced, ins.type, "u32")


@instruction("vote", "sync ballot any all b32 pred")
def vote(machine: Machine, ins: Instruction) -> Step:
    def counted(x: Array, members: Array) -> Array:
        if (members != 0xFFFFFFFF).any():
            raise NotImplementedError(f"PTX vote of a part of a warp: {ins}")
        voters = machine.vector(x).reshape(-1, 32)
        if "ballot" in ins.modifiers:
            return np.repeat(np.packbits(voters, axis=1, bitorder="little").view(np.uint32)[:, 0], 32)
        return np.repeat(voters.any(axis=1) if "any" in ins.modifiers else voters.all(axis=1), 32)

    return elementwise(machine, ins, counted, "pred", "u32")


@instruction("fence membar", "proxy async shared::cta acq_rel sc cta gpu sys gl")
def fence(machine: Machine, ins: Instruction) -> Step:
    if "proxy" not in ins.modifiers:
        return lambda mask: None  # the simulated memory is consistent

    def step(mask: Mask) -> None:
        leaders = machine.active(mask)[::32]
        machine.shared.fence(machine.slot[leaders], machine.stamps[leaders])

    return step


@instruction("bar", "warp sync")
def synchronise_warp(machine: Machine, ins: Instruction) -> Step:
    """`bar.warp.sync` does nothing, because lanes of a warp run in step. (The scheduler executes `bar.sync 0`.)"""
    if ins.modifiers != ("warp", "sync"):
        raise NotImplementedError("named barriers are unknown")
    return lambda mask: None
