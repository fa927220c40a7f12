"""Matrix fragments and products: ldmatrix, stmatrix, mma.sync, and the warpgroup's wgmma.

Their layouts all consist of one block: 8 rows of 4 registers. Lane 4r + c of a warp holds register c of row r (two
elements of 16 bits, or one of 32).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from benchmarks.proofs.ptxsim.asynchronous import Product
from benchmarks.proofs.ptxsim.faults import blame
from benchmarks.proofs.ptxsim.floats import canonical, from_half
from benchmarks.proofs.ptxsim.machine import Machine, Mask, Operand, Step, instruction
from benchmarks.proofs.ptxsim.memory import Array, Index
from benchmarks.proofs.ptxsim.parse import Instruction, elements

_COUNTS = "x1 x2 x4"
WARPGROUP = 128
"""Threads of a warpgroup."""


@instruction("ldmatrix", f"sync aligned m8n8 {_COUNTS} trans shared shared::cta b16")
def load_matrices(machine: Machine, ins: Instruction) -> Step:
    writes = [machine.destination(name) for name in elements(ins.operands[0])]
    address = machine.address(ins.operands[1])

    def step(mask: Mask) -> None:
        where = address()
        flat = machine.whole(mask)[:, : 8 * len(writes)].reshape(-1)  # the lanes whose addresses are used
        with blame(flat):
            rows = machine.shared.load(machine.slot[flat], where[flat], 16, machine.stamps[flat])
        machine.counts.shared_access(where, _marked(machine, flat), 16)
        blocks = rows.view(np.uint16).reshape(-1, len(writes), 8, 8)
        if "trans" in ins.modifiers:
            blocks = np.ascontiguousarray(blocks.swapaxes(2, 3))
        registers = blocks.view(np.uint32).reshape(-1, len(writes), 32)
        for i, write in enumerate(writes):
            write(machine.spread(registers[:, i].reshape(-1), mask), mask)

    return step


@instruction("stmatrix", f"sync aligned m8n8 {_COUNTS} trans shared shared::cta b16")
def store_matrices(machine: Machine, ins: Instruction) -> Step:
    sources = [machine.operand(name, "b32") for name in elements(ins.operands[1])]
    address = machine.address(ins.operands[0])

    def step(mask: Mask) -> None:
        where, lanes = address(), machine.whole(mask)
        flat = lanes[:, : 8 * len(sources)].reshape(-1)
        registers = np.stack([machine.vector(source())[lanes] for source in sources], axis=1)
        blocks = registers.view(np.uint16).reshape(-1, len(sources), 8, 8)
        if "trans" in ins.modifiers:
            blocks = np.ascontiguousarray(blocks.swapaxes(2, 3))
        with blame(flat):
            rows = blocks.view(np.uint64).reshape(-1, 2)
            machine.shared.store(machine.slot[flat], where[flat], rows, machine.stamps[flat])
        machine.counts.shared_access(where, _marked(machine, flat), 16)

    return step


def _marked(machine: Machine, lanes: Index) -> Mask:
    """A mask of these lanes."""
    if lanes.size == machine.lanes:
        return None
    marked = np.zeros(machine.lanes, np.bool_)
    marked[lanes] = True
    return marked


def _decoded(bits: Array, type_: str) -> Array:
    """Decode bits to f32. tf32 has a mantissa of 10 bits; the hardware ignores the others."""
    if type_ in ("f16", "bf16"):
        return from_half(bits, type_)
    return (bits & np.uint32(0xFFFFE000)).view(np.float32)


def _registers(machine: Machine, sources: Sequence[Operand], type_: str) -> Array:
    """Read registers in f32: [registers, warps, 8, elements of 4 registers]."""
    bits = np.stack([machine.vector(source()) for source in sources])
    bits = bits if type_ == "tf32" else bits.view(np.uint16)
    return _decoded(bits.reshape(len(sources), machine.lanes // 32, 8, -1), type_)


def _left_operand(machine: Machine, sources: Sequence[Operand], type_: str) -> Array:
    """Read operand A [warps, 16, K] from registers of the blocks (0, 0), (1, 0), (0, 1), (1, 1)."""
    blocks = _registers(machine, sources, type_).reshape(2, 2, machine.lanes // 32, 8, -1)
    return blocks.transpose(2, 1, 3, 0, 4).reshape(machine.lanes // 32, 16, -1)


@instruction("mma", "sync aligned m16n8k16 m16n8k8 row col f32 f16 bf16 tf32")
def multiply_fragments(machine: Machine, ins: Instruction) -> Step:
    """D = A B + C for each warp, accumulated in f32."""
    type_ = ins.modifiers[-2]
    shape = "m16n8k8" if type_ == "tf32" else "m16n8k16"
    if ins.modifiers != ("sync", "aligned", shape, "row", "col", "f32", type_, type_, "f32"):
        raise NotImplementedError("shape or types")
    a, b = ([machine.operand(name, "b32") for name in elements(text)] for text in ins.operands[1:3])
    c = [machine.operand(name, "f32") for name in elements(ins.operands[3])]
    writes = [machine.destination(name) for name in elements(ins.operands[0])]

    def step(mask: Mask) -> None:
        machine.whole(mask)
        warps = machine.lanes // 32
        left = _left_operand(machine, a, type_)
        right = _registers(machine, b, type_).transpose(1, 0, 3, 2).reshape(warps, -1, 8)  # [warps, K, 8]
        added = np.stack([machine.vector(source()) for source in c]).reshape(2, 2, warps, 8, 4)
        product = (left @ right).reshape(warps, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3) + added
        for write, value in zip(writes, canonical(product).reshape(4, -1), strict=True):
            write(value, mask)

    return step


_SWIZZLES = {0: (16, 0), 1: (128, 7), 2: (64, 3), 3: (32, 1)}
"""Code in the descriptor -> bytes of a row, and the mask of its 16-byte units that are exchanged."""


def _operand_units(descriptor: Index, rows: int, *, transposed: bool) -> Index:
    """Addresses [warpgroups, units] of the 16-byte units of `rows` x 32 bytes that matrix descriptors describe.

    Units are ordered [row][unit of the row], or, if transposed (rows contiguous in memory), [8 rows][k].
    """
    start, leading, stride = (((descriptor >> shift & 0x3FFF) << 4)[:, None, None] for shift in (0, 16, 32))
    swizzle = (descriptor >> 62) & 3
    if (swizzle != swizzle[0]).any():
        raise NotImplementedError("PTX matrix descriptors that swizzle differently in one instruction")
    row_bytes, exchanged = _SWIZZLES[int(swizzle[0])]
    if transposed:
        row, k = 8 * np.arange(rows // 8)[:, None], np.arange(16)[None, :]
        per_row = row_bytes // 2
        units = start + row // per_row * leading + k // 8 * stride + k % 8 * row_bytes + row % per_row * 2
    else:
        row, unit = np.arange(rows)[:, None], np.arange(2)[None, :]
        units = start + row // 8 * stride + row % 8 * row_bytes + unit * (16 if exchanged else leading)
    return (units ^ ((units >> 7 & exchanged) << 4)).reshape(len(descriptor), -1)


def _shared_operand(
    machine: Machine, groups: Index, descriptor: Array, rows: int, type_: str, *, transposed: bool
) -> tuple[Array, Index]:
    """Read an operand [warpgroups, rows, K] in f32 from shared memory; also return the granules that are read."""
    first_lanes = groups * WARPGROUP
    units = _operand_units(descriptor[first_lanes].astype(np.int64), rows, transposed=transposed)
    lanes = np.repeat(first_lanes, units.shape[1])
    with blame(lanes):
        words, granules = machine.shared.begin_products(machine.slot[lanes], units.reshape(-1), machine.stamps[lanes])
    bits = words.view(np.uint32 if type_ == "tf32" else np.uint16)
    values = _decoded(bits, type_).reshape(len(groups), *((rows // 8, 16, 8) if transposed else (rows, -1)))
    if transposed:
        values = values.swapaxes(2, 3).reshape(len(groups), rows, 16)
    return values, granules.reshape(len(groups), -1)


@instruction(
    "wgmma",
    "mma_async fence commit_group wait_group sync aligned f32 f16 bf16 tf32 "
    + " ".join(f"m64n{n}k{k}" for n in range(8, 257, 8) for k in (8, 16)),
)
def multiply_by_warpgroup(machine: Machine, ins: Instruction) -> Step:
    """Multiply asynchronously: only after a wait may the result be read and the operands' memory be overwritten."""
    if ins.modifiers[0] == "fence":
        return lambda mask: None
    if ins.modifiers[0] == "commit_group":
        return lambda mask: machine.product_groups.commit(mask)
    if ins.modifiers[0] == "wait_group":
        pending = int(ins.operands[0])
        return lambda mask: _wait(machine, mask, pending)
    return _multiply_asynchronously(machine, ins)


def _multiply_asynchronously(machine: Machine, ins: Instruction) -> Step:
    names, a_text, b_text, keep_text, *immediates = ins.operands
    type_ = ins.type
    match = re.fullmatch(r"m64n(\d+)k" + ("8" if type_ == "tf32" else "16"), ins.modifiers[3])
    if not match or ins.modifiers[4:] != ("f32", type_, type_) or immediates[:2] != ["1", "1"]:
        raise NotImplementedError("shape, types or signs")
    columns, results = int(match[1]), elements(names)
    in_registers = a_text.startswith("{")
    # Whether each operand in shared memory is transposed, which only 16-bit types can be.
    transposed_b, transposed_a = [*(text == "1" for text in immediates[:1:-1]), False, False][:2]
    fragments = [machine.operand(name, "b32") for name in elements(a_text)] if in_registers else []
    a_descriptor = None if in_registers else machine.operand(a_text, "u64")
    b_descriptor, keep = machine.operand(b_text, "u64"), machine.operand(keep_text, "pred")

    def step(mask: Mask) -> None:
        groups = machine.whole(mask, WARPGROUP)[:, 0] // WARPGROUP
        granules = []
        if a_descriptor is None:
            left = _left_operand(machine, fragments, type_).reshape(-1, 64, 32 // (4 if type_ == "tf32" else 2))[groups]
        else:
            descriptor = machine.vector(a_descriptor())
            left, read = _shared_operand(machine, groups, descriptor, 64, type_, transposed=transposed_a)
            granules.append(read)
        descriptor = machine.vector(b_descriptor())
        right, read = _shared_operand(machine, groups, descriptor, columns, type_, transposed=transposed_b)
        granules.append(read)
        product = (left @ right.swapaxes(1, 2)).reshape(-1, 4, 2, 8, columns // 8, 4, 2)
        product = product.transpose(4, 2, 6, 0, 1, 3, 5).reshape(len(results), -1)  # [registers, lanes of the groups]
        lanes = machine.active(mask)
        kept = machine.vector(keep())[lanes]
        for name, value in zip(results, product, strict=True):
            before = machine.accumulator(name)
            after = before.copy()
            after[lanes] = canonical(np.where(kept, before[lanes] + value, value))
            machine.in_flight[name] = after.view(np.uint32)
            machine.registers.pop(name, None)
        for i, group in enumerate(groups):
            span = slice(int(group) * WARPGROUP, (int(group) + 1) * WARPGROUP)
            committed = int(machine.product_groups.committed[span.start])
            machine.products.append(Product(span, committed, frozenset(results), [read[i] for read in granules]))

    return step


def _wait(machine: Machine, mask: Mask, pending: int) -> None:
    under_way = []
    for product in machine.products:
        committed = machine.product_groups.committed[product.lanes.start] - pending
        if product.group < committed and (mask is None or mask[product.lanes].all()):
            machine.shared.end_products(product.granules, machine.stamps[product.lanes.start])
        else:
            under_way.append(product)
    machine.products[:] = under_way
    busy = frozenset[str]().union(*(product.registers for product in under_way))
    for name in [name for name in machine.in_flight if name not in busy]:
        machine.registers[name] = machine.in_flight.pop(name)
