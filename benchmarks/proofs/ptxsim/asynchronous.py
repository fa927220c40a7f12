"""Asynchronous copies into shared memory and asynchronous matrix products that are under way."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from benchmarks.proofs.ptxsim.memory import Array, Index


class Groups:
    """Counts the groups of operations that each lane has committed. A lane waits until at most N groups are pending."""

    def __init__(self, lanes: int) -> None:
        self.committed = np.zeros(lanes, np.int64)

    def commit(self, mask: Array | None) -> None:
        self.committed += 1 if mask is None else mask

    def complete(self, lanes: Index, group: Index, mask: Array | None, pending: int) -> Array:
        """Tell which operations are done after a wait.

        Args:
            lanes: the lanes that issued the operations.
            group: the number of groups that each lane had committed then.
            mask: the lanes that wait.
            pending: the most groups that may still be pending after the wait.
        """
        waiting = True if mask is None else mask[lanes]
        return (group < self.committed[lanes] - pending) & waiting


@dataclass
class Copy:
    """The data of one copy instruction, which lands in shared memory when its lanes have waited."""

    lanes: Index
    group: Index
    row: Index
    data: Array

    def split(self, which: Array) -> Copy:
        return Copy(self.lanes[which], self.group[which], self.row[which], self.data[which])


@dataclass
class Product:
    """A matrix product of one warpgroup: the registers that it writes and the shared memory that it reads."""

    lanes: slice
    group: int
    registers: frozenset[str]
    granules: list[Index]
