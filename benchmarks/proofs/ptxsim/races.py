"""Which warp last wrote and last read every few bytes: enough to see a missing barrier, whatever order the warps ran in.

Two accesses to the same bytes, one of them a write, are ordered if one warp made both, or if both warps belong to one CTA
and a barrier lies between. (Lanes of one warp run in lockstep here, and are taken to be ordered.) Time is therefore
counted in epochs: the number of barriers that the CTA has passed. An access carries a stamp (CTA, epoch, warp).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from benchmarks.proofs.ptxsim.faults import RaceFault, UninitialisedFault, first

Stamps = npt.NDArray[np.int64]
Granules = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

_CTA, _EPOCH = 40, 8  # bit offsets; the warp is in the lowest 8 bits
_NEVER = -1
_SEVERAL_WARPS = (1 << _EPOCH) - 1
_SEVERAL_CTAS = np.int64(1 << 62)


def stamp(cta: Stamps, epoch: Stamps, warp: Stamps) -> Stamps:
    return (cta << _CTA) | (epoch << _EPOCH) | warp


def by_all_warps(stamps: Stamps) -> Stamps:
    """The stamp of what several warps of a CTA do together."""
    return stamps | _SEVERAL_WARPS


def _unordered(before: Stamps, now: Stamps) -> Flags:
    """Of one CTA and epoch, but not of one warp; or of different CTAs."""
    differ = before ^ now  # negative where there was nothing before
    return (differ > 0) & ((differ < 1 << _EPOCH) | (differ >= 1 << _CTA))


class AccessLog:
    """For a range of memory, divided into granules: the size of its smallest access."""

    def __init__(self, granules: int) -> None:
        self.writes = np.full(granules, _NEVER, np.int64)
        self.reads = np.full(granules, _NEVER, np.int64)

    def read(self, granules: Granules, now: Stamps, *, initialised: bool) -> None:
        """Note reads; `initialised`: bytes that nobody wrote may not be read.

        Args:
            granules: [accesses, granules of an access].
            now: [accesses, 1].
        """
        written = self.writes.take(granules)
        if initialised and (unwritten := written == _NEVER).any():
            raise UninitialisedFault("read of shared memory that this CTA never wrote", first(unwritten))
        if (unordered := _unordered(written, now)).any():
            raise RaceFault(
                "read of what another warp writes, with no barrier between, or another CTA", first(unordered)
            )
        before = self.reads.take(granules)
        self.reads[granules] = now
        after = self.reads.take(granules)  # not `now`: others read in this very instruction
        several = _unordered(before, now) | (after != now)
        if several.any():
            by_ctas = (before ^ now >= 1 << _CTA) | (after ^ now >= 1 << _CTA)
            self.reads[granules[several]] = np.where(by_ctas, _SEVERAL_CTAS, by_all_warps(now))[several]

    def check_write(self, granules: Granules, now: Stamps, same_value: Flags | None = None) -> None:
        """Fault if a write would be unordered with an earlier access.

        A warp may write what another warp of its CTA has just written, if it is the same value (`same_value` [accesses]):
        where a tensor has fewer elements than the CTA has threads, Triton lets several warps do so.
        """
        if (unordered := _unordered(self.reads.take(granules), now)).any():
            raise RaceFault(
                "write of what another warp reads, with no barrier between, or another CTA", first(unordered)
            )
        before = self.writes.take(granules)
        unordered = _unordered(before, now)
        if same_value is not None:
            unordered &= ~same_value[:, None] | (before ^ now >= 1 << _CTA)
        if unordered.any():
            raise RaceFault(
                "write of what another warp writes, with no barrier between, or another CTA", first(unordered)
            )

    def write(self, granules: Granules, now: Stamps, lost: Flags | None = None) -> None:
        """Note writes; `lost` [accesses]: another value is there after the instruction, written by another lane.

        Between lanes of one warp that is let pass: hardware keeps one of the values, and Triton lets lanes store partial
        sums twice that were added in different orders.
        """
        self.writes[granules] = now
        by_others = self.writes.take(granules) ^ now
        if (conflict := by_others >= 1 << _CTA).any():
            raise RaceFault("two CTAs write to one place", first(conflict))
        if lost is not None and lost.any() and (conflict := (by_others != 0) & lost[:, None]).any():
            raise RaceFault("two warps write different values to one place in one instruction", first(conflict))

    def visible(self, granules: Granules, now: Stamps) -> Flags:
        """Whether these were written by the stamp's own warp, or before the last barrier."""
        return ~_unordered(self.writes.take(granules), now)
