"""Instructions that access memory: loads, stores, atomics and asynchronous copies."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from benchmarks.proofs.ptxsim.asynchronous import Copy
from benchmarks.proofs.ptxsim.faults import blame
from benchmarks.proofs.ptxsim.machine import DTYPES, Machine, Mask, Step, instruction
from benchmarks.proofs.ptxsim.memory import Array, word_view
from benchmarks.proofs.ptxsim.parse import Instruction, elements

_TYPES = "b8 u8 s8 b16 u16 s16 b32 u32 s32 f32 b64 u64 s64 f64"
_SHARED = "shared shared::cta"
_CACHING = "ca cg cs cv lu wb wt nc"


def access_size(ins: Instruction) -> int:
    """Bytes that a load or store moves for each lane."""
    vector = next((int(m[1:]) for m in ins.modifiers if m in ("v2", "v4", "v8")), 1)
    return vector * DTYPES[ins.type].itemsize


@instruction("ld", f"param global {_SHARED} v2 v4 v8 {_CACHING} {_TYPES}")
def load(machine: Machine, ins: Instruction) -> Step:
    writes = [machine.destination(name) for name in elements(ins.operands[0])]
    dtype = DTYPES[ins.type]
    if "param" in ins.modifiers:
        parameter = ins.operands[1].strip("[] ")
        return lambda mask: writes[0](machine.arguments[parameter].astype(f"u{dtype.itemsize}").view(dtype), mask)
    address, size = machine.address(ins.operands[1]), access_size(ins)
    from_global = "global" in ins.modifiers

    def step(mask: Mask) -> None:
        lanes, where = machine.active(mask), address()
        with blame(lanes):
            if from_global:
                rows = machine.memory.load(where[lanes], size, machine.stamps[lanes])
                machine.counts.global_access("load", where, mask, size)
            else:
                rows = machine.shared.load(machine.slot[lanes], where[lanes], size, machine.stamps[lanes])
                machine.counts.shared_access(where, mask, size)
        values = rows.view(dtype)
        for i, write in enumerate(writes):
            write(machine.spread(values[:, i], mask), mask)

    return step


@instruction("st", f"global {_SHARED} v2 v4 v8 {_CACHING} {_TYPES}")
def store(machine: Machine, ins: Instruction) -> Step:
    sources = [machine.operand(name, ins.type) for name in elements(ins.operands[1])]
    address, size = machine.address(ins.operands[0]), access_size(ins)
    to_global = "global" in ins.modifiers

    def step(mask: Mask) -> None:
        lanes, where = machine.active(mask), address()
        values = np.stack([machine.vector(source()) for source in sources], axis=1)
        rows = word_view(values.view(np.uint8).reshape(-1), size)[lanes]
        with blame(lanes):
            if to_global:
                machine.memory.store(where[lanes], rows, machine.stamps[lanes])
                machine.counts.global_access("store", where, mask, size)
            else:
                machine.shared.store(machine.slot[lanes], where[lanes], rows, machine.stamps[lanes])
                machine.counts.shared_access(where, mask, size)

    return step


_ATOMIC: dict[str, Callable[..., Array]] = {
    "add": lambda old, a: old + a,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "exch": lambda old, a: a,
    "cas": lambda old, expected, a: np.asarray(np.where(old == expected, a, old)),
}


@instruction("atom red", f"global relaxed acq_rel acquire release gpu cta sys {' '.join(_ATOMIC)} {_TYPES}")
def atomic(machine: Machine, ins: Instruction) -> Step:
    """atom and red on global memory, one lane after another. red returns nothing."""
    name, place, *others = ins.operands if ins.opcode == "atom" else ("_", *ins.operands)
    fn = next(_ATOMIC[m] for m in ins.modifiers if m in _ATOMIC)
    write, address = machine.destination(name), machine.address(place)
    sources = [machine.operand(other, ins.type) for other in others]
    dtype = DTYPES[ins.type]

    def step(mask: Mask) -> None:
        lanes, where = machine.active(mask), address()
        values = [machine.vector(source()) for source in sources]
        before = np.zeros(machine.lanes, dtype)
        with blame(lanes):
            for lane in lanes:
                one, stamps = slice(lane, lane + 1), machine.stamps[lane : lane + 1]
                old = machine.memory.load(where[one], dtype.itemsize, stamps)
                before[one] = old.view(dtype)[0]
                new = fn(before[one], *[value[one] for value in values]).astype(dtype)
                machine.memory.store(where[one], new.view(old.dtype)[:, None], stamps)
        write(before, mask)

    return step


@instruction("cp", f"async ca cg {_SHARED} global commit_group wait_group wait_all")
def copy_asynchronously(machine: Machine, ins: Instruction) -> Step:
    """Copy asynchronously: data is read at once, but lands in shared memory only when its lane waits."""
    if "commit_group" in ins.modifiers:
        return lambda mask: machine.copy_groups.commit(mask)
    if "wait_group" in ins.modifiers:
        pending = int(ins.operands[0])
        return lambda mask: _land(machine, mask, pending)
    if "wait_all" in ins.modifiers:

        def wait_for_all(mask: Mask) -> None:
            machine.copy_groups.commit(mask)
            _land(machine, mask, 0)

        return wait_for_all
    return _copy(machine, ins)


def _copy(machine: Machine, ins: Instruction) -> Step:
    target, source = (machine.address(text) for text in ins.operands[:2])
    size = int(ins.operands[2], 0)
    # The rest of the destination beyond the source's size is filled with zeros.
    source_size = machine.operand(ins.operands[3] if len(ins.operands) > 3 else ins.operands[2], "u32")

    def step(mask: Mask) -> None:
        lanes, where, to = machine.active(mask), source(), target()
        wanted = machine.vector(source_size())
        if not np.isin(wanted[lanes], (0, size)).all():
            raise NotImplementedError(f"PTX partial source of {ins}")
        reads = (wanted == size) & (True if mask is None else mask)
        readers, slots, stamps = np.flatnonzero(reads), machine.slot[lanes], machine.stamps[lanes]
        words = np.zeros((machine.lanes, max(size // 8, 1)), f"u{min(size, 8)}")
        if readers.size:
            with blame(readers):
                words[readers] = machine.memory.load(where[readers], size, machine.stamps[readers])
            machine.counts.global_access("load", where, reads, size)
        with blame(lanes):
            rows = machine.shared.begin_copy(slots, to[lanes], size, stamps)
        machine.counts.shared_access(to, mask, size)
        machine.copies.append(Copy(lanes, machine.copy_groups.committed[lanes], rows, words[lanes]))

    return step


def _land(machine: Machine, mask: Mask, pending: int) -> None:
    """Write the copies that the lanes in `mask` have waited for."""
    remaining = []
    for copy in machine.copies:
        done = machine.copy_groups.complete(copy.lanes, copy.group, mask, pending)
        landed = copy if done.all() else copy.split(done)
        machine.shared.end_copy(landed.row, landed.data, machine.stamps[landed.lanes])
        if not done.all():
            remaining.append(copy.split(~done))
    machine.copies[:] = remaining
