"""What is under way: asynchronous copies into shared memory, and asynchronous matrix products."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from benchmarks.proofs.ptxsim.memory import Array, Index


class Groups:
    """Every lane commits what it has issued in groups, and waits until at most so many are pending."""

    def __init__(self, lanes: int) -> None:
        self.committed = np.zeros(lanes, np.int64)

    def commit(self, mask: Array | None) -> None:
        self.committed += 1 if mask is None else mask

    def complete(self, lanes: Index, group: Index, mask: Array | None, pending: int) -> Array:
        """Whether what these lanes issued (`group`: how many they had committed then) is done after their wait."""
        waiting = True if mask is None else mask[lanes]
        return (group < self.committed[lanes] - pending) & waiting


@dataclass
class Copy:
    """Of one instruction: what lands in shared memory when the lanes have waited."""

    lanes: Index
    group: Index
    row: Index
    data: Array

    def split(self, which: Array) -> Copy:
        return Copy(self.lanes[which], self.group[which], self.row[which], self.data[which])


@dataclass
class Product:
    """Of one warpgroup: the registers it writes and the shared memory it reads."""

    lanes: slice
    group: int
    registers: frozenset[str]
    granules: list[Index]
