"""The machine: registers, operands, and the order in which instructions run.

A lane is a thread of one of the CTAs that run together, and a register is an array with one element per lane. Each
instruction is built into a function that takes the mask of the lanes that execute it. Families of instructions are in
modules of their own, which enter them in a table with `instruction`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.proofs.ptxsim.asynchronous import Copy, Groups, Product
from benchmarks.proofs.ptxsim.counts import Counts
from benchmarks.proofs.ptxsim.faults import DivergenceFault, Fault, PendingFault
from benchmarks.proofs.ptxsim.memory import Array, GlobalMemory, Index, SharedMemory
from benchmarks.proofs.ptxsim.parse import Instruction, Program
from benchmarks.proofs.ptxsim.races import Stamps, stamp

Mask = Array | None
"""True for the lanes that execute an instruction; None: all do."""
Step = Callable[[Mask], None]
"""Executes an instruction."""
Operand = Callable[[], Array]
"""Reads a value for each lane, or one for all lanes (0-d)."""
Write = Callable[[Array, Mask], None]
"""Writes the lanes in the mask."""
Grid = tuple[int, int, int]

DTYPES: dict[str, np.dtype[Any]] = {
    **{f"{kind}{bits}": np.dtype(f"u{bits // 8}") for kind in "bu" for bits in (8, 16, 32, 64)},
    **{f"s{bits}": np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"f{bits}": np.dtype(f"f{bits // 8}") for bits in (16, 32, 64)},
    "bf16": np.dtype("u2"),  # as bits
    **{f"{type_}x2": np.dtype("u4") for type_ in ("u16", "s16", "f16", "bf16")},
    "pred": np.dtype("?"),
}

_SPECIAL = {"%tid.x", "%ntid.x", "%laneid", "%warpid", *(f"%{n}ctaid.{axis}" for n in ("", "n") for axis in "xyz")}

_Builder = Callable[["Machine", Instruction], Step]
_TABLE: dict[str, tuple[_Builder, frozenset[str]]] = {}


def instruction(opcodes: str, modifiers: str) -> Callable[[_Builder], _Builder]:
    """Enter a builder in the table for these opcodes. Instructions with any other modifier are refused."""

    def enter(builder: _Builder) -> _Builder:
        for opcode in opcodes.split():
            _TABLE[opcode] = builder, frozenset(modifiers.split())
        return builder

    return enter


@dataclass(frozen=True)
class Launch:
    """Everything that the CTAs of a launch share."""

    memory: GlobalMemory
    arguments: Mapping[str, Array]
    grid: Grid
    shared_bytes: int
    counts: Counts


LANES_AT_ONCE = 2048
"""Most threads of the CTAs that run side by side. A step in Python costs about the same for 100 lanes as for 2,000."""


class Machine:
    """A program made ready to run, and the state of the CTAs that run together."""

    memory: GlobalMemory
    arguments: Mapping[str, Array]
    counts: Counts
    shared: SharedMemory
    lanes: int
    slot: Index
    """Index of the CTA that a lane belongs to."""
    group: Array
    """True for the lanes that run now: those at the same instruction."""
    _alive: Array

    def __init__(self, program: Program, shared_granule: int) -> None:
        self.program = program
        self.shared_granule = shared_granule
        self.registers: dict[str, Array] = {}
        self.in_flight: dict[str, Array] = {}
        """Registers that an asynchronous matrix product is writing, kept apart so that a read of them is noticed."""
        self.products: list[Product] = []
        self.copies: list[Copy] = []
        self._at_barrier: dict[int, Array] = {}
        self._stamps: Stamps | None = None
        self._special: dict[str, Array] = {}
        self._steps = [self._build(ins) for ins in program.instructions]
        self._predicates = [
            self.operand(ins.predicate, "pred") if ins.predicate else None for ins in program.instructions
        ]

    # Instructions and their operands.

    def _build(self, instruction: Instruction) -> Step | None:
        """Build an instruction. None: the scheduler executes it."""
        if _is_control(instruction):
            return None
        builder, modifiers = _TABLE.get(instruction.opcode, (None, frozenset[str]()))
        if builder is None or not modifiers.issuperset(
            m for m in instruction.modifiers if m[:4] not in ("L1::", "L2::")
        ):
            raise NotImplementedError(f"PTX {instruction}")
        try:
            return builder(self, instruction)
        except (NotImplementedError, ValueError) as error:
            raise NotImplementedError(f"PTX {instruction}: {error}") from error

    def operand(self, text: str, type_: str) -> Operand:
        """A reader of a register, constant, special register or shared-memory address as `type_`."""
        dtype = DTYPES[type_]
        if text.startswith("!"):
            positive = self.operand(text[1:], type_)
            return lambda: ~positive()
        register_type = self.program.register_type(text)
        if register_type is not None:
            return self._register(text, DTYPES[register_type], dtype)
        if text.startswith("%"):
            if text not in _SPECIAL:
                raise NotImplementedError(f"special register {text}")
            return lambda: self._special[text].view(dtype)
        constant = _constant(text, dtype)
        return lambda: constant

    def _register(self, name: str, stored: np.dtype[Any], dtype: np.dtype[Any]) -> Operand:
        if stored.itemsize < dtype.itemsize:
            raise NotImplementedError(f"register {name} of {stored} read as {dtype}")
        registers, narrow = self.registers, np.dtype(f"u{dtype.itemsize}")

        def read() -> Array:
            value = registers.get(name)
            if value is None:
                value = self._read_absent(name, stored)
            return value.view(dtype)

        if stored.itemsize == dtype.itemsize:
            return read

        def read_low_bits() -> Array:
            value = registers.get(name)
            if value is None:
                value = self._read_absent(name, stored)
            return value.astype(narrow).view(dtype)

        return read_low_bits

    def _read_absent(self, name: str, stored: np.dtype[Any]) -> Array:
        if name in self.in_flight:
            self._check_waited(name)
            return self.in_flight[name]
        # It was never written: LLVM's `undef`. All ones are a NaN of every type, so that a result would show it.
        self.registers[name] = value = np.full(self.lanes, -1).astype(stored)
        return value

    def _check_waited(self, name: str) -> None:
        for product in self.products:
            if name in product.registers and self.group[product.lanes].any():
                message = f"{name} is the result of an asynchronous matrix product, used before the wait for it"
                raise PendingFault(message, product.lanes.start)

    def destination(self, name: str) -> Write:
        """A writer of a register. Narrower values are extended according to their own type."""
        if name == "_":
            return lambda value, mask: None
        register_type = self.program.register_type(name)
        if register_type is None:
            raise NotImplementedError(f"destination {name}")
        stored, registers, in_flight = DTYPES[register_type], self.registers, self.in_flight

        def write(value: Array, mask: Mask) -> None:
            if value.dtype != stored:
                value = value.view(stored) if value.dtype.itemsize == stored.itemsize else value.astype(stored)
            if in_flight and name in in_flight:
                self._check_waited(name)
                registers[name] = in_flight.pop(name)
            if mask is not None:
                old = registers.get(name)
                value = np.where(mask, value, self._read_absent(name, stored) if old is None else old)
            elif value.ndim == 0:
                value = np.full(self.lanes, value, stored)
            registers[name] = value

        return write

    def address(self, text: str) -> Operand:
        """A reader of the address `[%rd1+8]`, `[%r1]` or `[global_smem+8]` as int64."""
        match = re.fullmatch(r"\[\s*([^\s+\]]+)\s*(?:\+\s*(-?\w+))?\s*\]", text)
        if not match:
            raise NotImplementedError(f"address {text}")
        offset = np.int64(int(match[2] or "0", 0))
        wide = self.program.register_type(match[1]) == "b64"
        base = self.operand(match[1], "s64" if wide else "u32")
        if wide:
            return lambda: self.vector(base()) + offset
        return lambda: self.vector(base()).astype(np.int64) + offset

    def vector(self, value: Array) -> Array:
        """The value with one element per lane."""
        return value if value.ndim else np.full(self.lanes, value)

    def accumulator(self, name: str) -> Array:
        """A register as f32, for wgmma, which alone may read it while it is in flight."""
        value = self.in_flight.get(name)
        if value is None:
            value = self.registers.get(name)
        return (self._read_absent(name, np.dtype(np.uint32)) if value is None else value).view(np.float32)

    def spread(self, values: Array, mask: Mask) -> Array:
        """Values of the active lanes, put at their lanes; the others get 0."""
        if mask is None:
            return np.ascontiguousarray(values)
        spread = np.zeros(self.lanes, values.dtype)
        spread[mask] = values
        return spread

    def active(self, mask: Mask) -> Index:
        return self._all_lanes if mask is None else np.flatnonzero(mask)

    def whole(self, mask: Mask, lanes: int = 32) -> Index:
        """The active lanes [warps, lanes] of an instruction that whole warps (or warpgroups) execute together.

        Raises:
            DivergenceFault: only a part of a warp is active.
        """
        if mask is not None:
            rows = mask.reshape(-1, lanes)
            if (torn := rows.any(axis=1) & ~rows.all(axis=1)).any():
                raise DivergenceFault(f"only a part of {lanes} lanes reaches it", int(np.argmax(torn)) * lanes)
        return self.active(mask).reshape(-1, lanes)

    # Running.

    @property
    def stamps(self) -> Stamps:
        """Stamps of accesses made now, one per lane, for the race detectors."""
        if self._stamps is None:
            self._stamps = stamp(self._cta_number[self.slot], self._epoch[self.slot], self._warp)
        return self._stamps

    def run(self, launch: Launch, ctas: Sequence[Grid]) -> None:
        """Run these CTAs to their end."""
        self.memory, self.arguments, self.counts = launch.memory, launch.arguments, launch.counts
        at_once = max(LANES_AT_ONCE // self.program.threads, 1)
        try:
            with np.errstate(all="ignore"):
                for start in range(0, len(ctas), at_once):
                    self._begin(launch, ctas[start : start + at_once])
                    self._run()
        finally:
            del self.memory, self.arguments, self.counts  # the machine is kept after its launches

    def _run(self) -> None:
        """Run CTAs side by side, in lockstep as long as their branches agree.

        Of the groups of lanes at different instructions, the one furthest behind runs, so that lanes that diverged
        meet again where their paths join.
        """
        waiting = {0: self.group}
        while waiting or self._at_barrier:
            if not waiting:
                self._pass_barrier()
                waiting, self._at_barrier = self._at_barrier, {}
            pc = min(waiting)
            self.group = waiting.pop(pc)
            for target, lanes in self._run_group(pc, min(waiting, default=len(self._steps))):
                waiting[target] = waiting[target] | lanes if target in waiting else lanes

    def _run_group(self, pc: int, stop: int) -> list[tuple[int, Array]]:
        """Run `self.group` from `pc` until it diverges, ends, or reaches `stop`, where another group waits to join it.

        Returns:
            The next instructions, each with the lanes that go there.
        """
        group: Mask = None if self.group.all() else self.group
        warps = int(self.group.reshape(-1, 32).any(axis=1).sum())
        executed = self.counts.executed
        while pc < stop:
            step, predicate, instruction = self._steps[pc], self._predicates[pc], self.program.instructions[pc]
            executed[pc] += warps
            mask = group
            if predicate is not None:
                wanted = self.vector(predicate())
                mask = wanted if group is None else wanted & group
                if mask.all():
                    mask = None
            pc += 1
            if step is None:
                lanes = self.group if mask is None else mask
                if lanes.any():
                    goes_to, rest = self._control(pc, instruction, lanes), self.group & ~lanes
                    if rest.any() or goes_to is None:
                        targets = [] if goes_to is None else [(goes_to, lanes)]
                        return [*targets, (pc, rest)] if rest.any() else targets
                    pc = goes_to
            elif mask is None or mask.any():
                try:
                    step(mask)
                except Fault as fault:
                    slot, thread = divmod(fault.where, self.program.threads)
                    place = f"thread {thread} of CTA {self._ctas[slot]}"
                    raise type(fault)(f"{fault}: {place}, at {instruction}", fault.where) from None
        return [(pc, self.group)]

    def _control(self, following: int, instruction: Instruction, lanes: Array) -> int | None:
        """The next instruction of these lanes. None: they end, or wait at a barrier for others."""
        if instruction.opcode == "bra":
            return self.program.labels[instruction.operands[0]]
        if instruction.opcode == "bar":
            self._at_barrier[following] = self._at_barrier.get(following, False) | lanes
            if len(self._at_barrier) > 1 or (lanes != self._alive).any():
                return None
            self._pass_barrier()
            self._at_barrier.clear()
            return following
        self._alive = self._alive & ~lanes
        return None

    def _pass_barrier(self) -> None:
        """Let all lanes pass their barriers: every lane that has not ended waits at one."""
        for following, lanes in self._at_barrier.items():
            here, alive = lanes.reshape(-1, 32), self._alive.reshape(-1, 32)
            if (torn := here.any(axis=1) & (here != alive).any(axis=1)).any():
                slot, warp = divmod(int(np.argmax(torn)), self.program.threads // 32)
                message = f"a part of warp {warp} of CTA {self._ctas[slot]} reaches another barrier, or none"
                raise DivergenceFault(f"{message}: {self.program.instructions[following - 1]}")
        self._epoch += 1
        self._stamps = None

    def _begin(self, launch: Launch, ctas: Sequence[Grid]) -> None:
        threads, grid = self.program.threads, launch.grid
        self.lanes = threads * len(ctas)
        self.shared = SharedMemory(launch.shared_bytes, len(ctas), self.shared_granule)
        self._all_lanes: Index = np.arange(self.lanes)
        thread = self._all_lanes % threads
        self.slot = self._all_lanes // threads
        self.group = np.ones(self.lanes, np.bool_)
        self._alive = self.group
        self._ctas = ctas
        self._cta_number = np.array([x + grid[0] * (y + grid[1] * z) for x, y, z in ctas], np.int64)
        self._warp: Index = thread // 32
        self._epoch = np.zeros(len(ctas), np.int64)
        self._stamps = None
        self.copy_groups, self.product_groups = Groups(self.lanes), Groups(self.lanes)
        self.registers.clear()
        self.in_flight.clear()
        self.products.clear()
        self.copies.clear()
        self._at_barrier = {}
        special = {"%tid.x": thread, "%laneid": thread % 32, "%warpid": self._warp, "%ntid.x": np.array(threads)}
        for axis, name in enumerate("xyz"):
            special[f"%ctaid.{name}"] = np.array([cta[axis] for cta in ctas])[self.slot]
            special[f"%nctaid.{name}"] = np.array(grid[axis])
        self._special.update({name: value.astype(np.uint32) for name, value in special.items()})


def _is_control(instruction: Instruction) -> bool:
    """True if the scheduler executes the instruction."""
    opcode, modifiers = instruction.opcode, instruction.modifiers
    if opcode == "bar" and modifiers == ("sync",) and instruction.operands == ("0",):
        return True
    return (opcode, modifiers) in {("bra", ()), ("bra", ("uni",)), ("ret", ()), ("exit", ())}


def _constant(text: str, dtype: np.dtype[Any]) -> Array:
    """Parse a constant: `-1`, `0x1F`, `0f3F800000` (the bits of an f32), `global_smem+16`."""
    if text.startswith("global_smem"):
        text = text.removeprefix("global_smem").lstrip("+ ") or "0"
    match = re.fullmatch(r"0([fFdD])([0-9a-fA-F]+)", text)
    try:
        value = int(match[2], 16) if match else int(text.rstrip("U"), 0)
    except ValueError:
        raise NotImplementedError(f"operand {text}") from None
    if match and dtype.itemsize != {"f": 4, "d": 8}[match[1].lower()]:
        raise NotImplementedError(f"constant {text} as {dtype}")
    if dtype == np.bool_:
        return np.array(value != 0)
    bits = value & ((1 << 8 * dtype.itemsize) - 1)
    return np.array(bits, f"u{dtype.itemsize}").view(dtype)
