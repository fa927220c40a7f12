"""Run the PTX that Triton generates on a CPU, check every access, and count what it costs.

`launch` runs a compiled kernel on CPU tensors as a GPU would: registers, predicates, shared memory, ldmatrix,
mma.sync, wgmma, cp.async and shuffles, as the compiler laid them out. Several CTAs run side by side as the lanes of
numpy arrays.

It raises a fault (see `faults`) for:
    - a global access outside the bytes of the tensors passed (exact to the byte, also between the rows of a strided view), a
      shared access outside the CTA's allocation, and an access that is not aligned to its size;
    - a read of shared memory that the CTA never wrote;
    - shared memory or a tensor that one warp writes and another reads or writes with no barrier between, and a tensor that
      one CTA writes and another reads or writes (except for tensors above `memory.LARGEST_LOGGED` and for kernels with
      atomics, which may order their accesses);
    - the destination of cp.async touched before its cp.async.wait_group; the result of wgmma read, or its operands
      overwritten, before its wgmma.wait_group; operands of wgmma not fenced by fence.proxy.async;
    - a barrier, or an instruction of whole warps, that only a part of a warp reaches.
Registers and shared memory start as NaN, so that a masked load without `other` shows in the result.

It does not model time, caches, the order in which warps run (one order runs; races are found from a log, not by chance), nor
the rounding inside a tensor core (products are summed in f32) and of approximate functions. It does not know TMA, clusters,
local memory, named barriers and calls: unknown PTX raises NotImplementedError with the PTX line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import product
from typing import Any

import numpy as np
import torch

# These modules enter their instructions in the machine's table when they are imported.
from benchmarks.proofs.ptxsim import (
    arithmetic,  # noqa: F401
    floats,  # noqa: F401
    matrix,  # noqa: F401
    moves,  # noqa: F401
    transfers,
    warps,  # noqa: F401
)
from benchmarks.proofs.ptxsim.counts import Counts
from benchmarks.proofs.ptxsim.faults import (
    DivergenceFault,
    Fault,
    MisalignedFault,
    OutOfBoundsFault,
    PendingFault,
    RaceFault,
    UninitialisedFault,
)
from benchmarks.proofs.ptxsim.machine import DTYPES, Launch, Machine
from benchmarks.proofs.ptxsim.memory import Array, GlobalMemory
from benchmarks.proofs.ptxsim.parse import Program, parse

__all__ = [
    "Counts",
    "DivergenceFault",
    "Fault",
    "MisalignedFault",
    "OutOfBoundsFault",
    "PendingFault",
    "RaceFault",
    "UninitialisedFault",
    "launch",
    "run_ptx",
]


def launch(
    kernel: Any, grid: Sequence[int], arguments: Sequence[Any], *, ctas: Sequence[tuple[int, int, int]] | None = None
) -> Counts:
    """Run a launch on the CPU.

    Args:
        kernel: a triton CompiledKernel for an NVIDIA GPU.
        grid: number of CTAs in one to three dimensions.
        arguments: CPU tensors and numbers that are passed at run time (not the constexprs), in order.
        ctas: the CTAs to run; None: all. For grids too large to run.

    Returns:
        What the launch cost.

    Raises:
        Fault: the kernel did something wrong; the message names the CTA, the thread, the PTX and the source line.
        NotImplementedError: the simulator does not know an instruction.
    """
    return run_ptx(kernel.asm["ptx"], kernel.metadata.shared, grid, arguments, ctas=ctas)


def run_ptx(
    ptx: str,
    shared_bytes: int,
    grid: Sequence[int],
    arguments: Sequence[Any],
    *,
    ctas: Sequence[tuple[int, int, int]] | None = None,
) -> Counts:
    """Run PTX text, which may have been edited, as `launch` does."""
    machine = _machine(ptx)
    program = machine.program
    tensors, values = _bind(program, arguments)
    ordered = any(i.opcode in ("atom", "red") for i in program.instructions)
    memory = GlobalMemory(tensors, _granule(program, "global"), find_races=not ordered)
    counts = Counts(program)
    x, y, z = (*grid, 1, 1)[:3]
    if ctas is None:
        ctas = [(i, j, k) for k, j, i in product(range(z), range(y), range(x))]
    machine.run(Launch(memory, values, (x, y, z), shared_bytes, counts), ctas)
    return counts


@lru_cache(maxsize=32)
def _machine(ptx: str) -> Machine:
    """A machine for a program. It is kept, because building it takes as long as a small launch."""
    program = parse(ptx)
    return Machine(program, _granule(program, "shared"))


def _bind(program: Program, arguments: Sequence[Any]) -> tuple[dict[str, torch.Tensor], Mapping[str, Array]]:
    """The tensors by name, and the values of the parameters. Triton's own ones at the end (scratch memory) are 0."""
    tensors: dict[str, torch.Tensor] = {}
    values: dict[str, Array] = {}
    for i, (name, type_) in enumerate(program.parameters):
        argument = arguments[i] if i < len(arguments) else 0
        if isinstance(argument, torch.Tensor):
            tensors[f"argument {i}"] = argument
            argument = argument.data_ptr()
        dtype = DTYPES[type_]
        if dtype.kind == "f":
            values[name] = np.array(argument, dtype).view(f"u{dtype.itemsize}")
        else:
            values[name] = np.array(int(argument) & ((1 << 8 * dtype.itemsize) - 1), f"u{dtype.itemsize}")
    return tensors, values


def _granule(program: Program, space: str) -> int:
    """Bytes of the smallest access, the unit of the race detectors. (ldmatrix and wgmma access 16 bytes.)"""
    accesses = [
        ins
        for ins in program.instructions
        if ins.opcode in ("ld", "st", "atom", "red", "cp") and any(m.split("::")[0] == space for m in ins.modifiers)
    ]
    return min([16, *(int(i.operands[2], 0) if i.opcode == "cp" else transfers.access_size(i) for i in accesses)])
