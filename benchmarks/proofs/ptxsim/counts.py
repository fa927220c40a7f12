"""Costs of a launch: warp instructions by class, sectors of global memory, wavefronts of shared memory."""

from __future__ import annotations

from collections import Counter
from typing import Any, Literal

import numpy as np

from benchmarks.proofs.ptxsim.memory import Array, Index
from benchmarks.proofs.ptxsim.parse import Instruction, Program

Kind = Literal["load", "store"]

SECTOR = 32
"""Bytes of the smallest unit that the memory system moves."""
BANKS = 32
"""Banks of shared memory, each 4 bytes wide."""

_SPECIAL_FUNCTIONS = {"ex2", "lg2", "rcp", "rsqrt", "sqrt", "div", "sin", "cos", "tanh"}
_FLOAT_ARITHMETIC = {"add", "sub", "mul", "fma", "max", "min", "neg", "abs"}
_NOBODY = np.iinfo(np.int64).max


class Counts:
    """Counts what a launch does while it runs."""

    def __init__(self, program: Program) -> None:
        self._instructions = program.instructions
        self.executed = np.zeros(len(program.instructions), np.int64)
        """Number of warps that executed each instruction."""
        self.sectors: dict[Kind, int] = {"load": 0, "store": 0}
        self.requests: dict[Kind, int] = {"load": 0, "store": 0}
        """Warp instructions that access global memory with any lane."""
        self.useful: dict[Kind, int] = {"load": 0, "store": 0}
        """Bytes asked for. A byte that several lanes of a warp ask for at once counts once."""
        self.wavefronts = 0
        self.ideal_wavefronts = 0
        self._known: dict[tuple[int, bytes], tuple[int, int]] = {}

    def global_access(self, kind: Kind, address: Index, mask: Array | None, size: int) -> None:
        """Count an access to global memory by all lanes in `mask`, ordered by warp."""
        wanted = address if mask is None else np.where(mask, address, _NOBODY)
        wanted = np.sort(wanted.reshape(-1, 32), axis=1)
        for name, unit in (("useful", 1), ("sectors", SECTOR)):
            distinct = _distinct(wanted // unit, _NOBODY // unit)
            getattr(self, name)[kind] += int(distinct.sum()) * (size if unit == 1 else 1)
        self.requests[kind] += int((wanted[:, 0] != _NOBODY).sum())

    def shared_access(self, address: Index, mask: Array | None, size: int) -> None:
        """Count an access to shared memory. A wavefront serves 128 bytes: 32 lanes of up to 4 bytes, 16 of 8, or 8 of 16."""
        wanted = address if mask is None else np.where(mask, address, _NOBODY)
        key = size, wanted.tobytes()
        if key not in self._known:
            self._known[key] = _wavefronts(wanted, size)
        wavefronts, ideal = self._known[key]
        self.wavefronts += wavefronts
        self.ideal_wavefronts += ideal

    def summary(self) -> dict[str, Any]:
        by_class: Counter[str] = Counter()
        for instruction, count in zip(self._instructions, self.executed.tolist(), strict=True):
            by_class[instruction_class(instruction)] += count
        return {
            "warp_instructions": int(self.executed.sum()),
            "by_class": dict(by_class.most_common()),
            "global_sectors": dict(self.sectors),
            "global_requests": dict(self.requests),
            "useful_bytes": dict(self.useful),
            "sector_efficiency": {
                kind: round(self.useful[kind] / (SECTOR * n), 3) if n else None for kind, n in self.sectors.items()
            },
            "smem_wavefronts": self.wavefronts,
            "smem_ideal": self.ideal_wavefronts,
        }


def instruction_class(instruction: Instruction) -> str:
    opcode, modifiers = instruction.opcode, instruction.modifiers
    if opcode in ("mma", "wgmma"):
        return "mma" if opcode == "mma" or "mma_async" in modifiers else f"wgmma.{modifiers[0]}"
    if opcode in ("ld", "st", "atom", "red"):
        return f"{opcode}.{modifiers[0].split('::')[0]}"
    if opcode == "cp":
        return "cp.async" if "shared" in modifiers else f"cp.{modifiers[1]}"
    if opcode in _SPECIAL_FUNCTIONS:
        return "mufu"
    if opcode in _FLOAT_ARITHMETIC and modifiers[-1] == "f32":
        return "fp32"
    return opcode


def _distinct(ascending: Array, nobody: int) -> Array:
    """Mark the first of equal values in each ascending row, except for `nobody`, which stands for lanes without access."""
    distinct = ascending != nobody
    distinct[:, 1:] &= ascending[:, 1:] != ascending[:, :-1]
    return distinct


def _wavefronts(address: Index, size: int) -> tuple[int, int]:
    """The wavefronts of an access, and how many it would take without bank conflicts."""
    words = max(size // 4, 1)
    nobody = _NOBODY // 4
    wanted = (address // 4)[:, None] + np.arange(words)
    wanted[address == _NOBODY] = nobody
    wanted = np.sort(wanted.reshape(-1, 32), axis=1)
    distinct = _distinct(wanted, nobody)
    row, _ = np.nonzero(distinct)
    by_bank = np.bincount(row * BANKS + wanted[distinct] % BANKS, minlength=wanted.shape[0] * BANKS)
    return int(by_bank.reshape(-1, BANKS).max(axis=1).sum()), int((wanted[:, 0] != nobody).sum())
