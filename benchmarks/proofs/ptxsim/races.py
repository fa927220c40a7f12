"""Log which warp last wrote and last read each granule of memory, to find missing barriers whatever order warps run in.

Two accesses to the same bytes, one of them a write, are ordered if one warp made both, or if both warps belong to one
CTA and a barrier lies between. (Lanes of one warp run in lockstep here, and count as ordered.) So time is counted in
epochs: the number of barriers that the CTA has passed. An access carries a stamp (CTA, epoch, warp).
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
    """Stamps of accesses."""
    return (cta << _CTA) | (epoch << _EPOCH) | warp


def by_all_warps(stamps: Stamps) -> Stamps:
    """The stamps of accesses that several warps of a CTA make together."""
    return stamps | _SEVERAL_WARPS


def _unordered(before: Stamps, now: Stamps) -> Flags:
    """True for unordered accesses: those of different warps in one CTA and epoch, or of different CTAs."""
    differ = before ^ now  # negative where there was no access before
    return (differ > 0) & ((differ < 1 << _EPOCH) | (differ >= 1 << _CTA))


class AccessLog:
    """The last write and the last read of every granule in a range of memory. The smallest access is one granule."""

    def __init__(self, granules: int) -> None:
        self.writes = np.full(granules, _NEVER, np.int64)
        self.reads = np.full(granules, _NEVER, np.int64)

    def read(self, granules: Granules, now: Stamps, *, initialised: bool) -> None:
        """Log reads.

        Args:
            granules: [accesses, granules of an access].
            now: stamps [accesses, 1].
            initialised: whether a read of a granule that was never written is a fault.
        """
        written = self.writes.take(granules)
        if initialised and (unwritten := written == _NEVER).any():
            raise UninitialisedFault("read of shared memory that this CTA never wrote", first(unwritten))
        if (unordered := _unordered(written, now)).any():
            raise RaceFault(
                "read of what another warp writes with no barrier between, or of what another CTA writes",
                first(unordered),
            )
        before = self.reads.take(granules)
        self.reads[granules] = now
        after = self.reads.take(granules)  # may differ from `now`: other warps read in the same instruction
        several = _unordered(before, now) | (after != now)
        if several.any():
            by_ctas = (before ^ now >= 1 << _CTA) | (after ^ now >= 1 << _CTA)
            self.reads[granules[several]] = np.where(by_ctas, _SEVERAL_CTAS, by_all_warps(now))[several]

    def check_write(self, granules: Granules, now: Stamps, same_value: Flags | None = None) -> None:
        """Raise a fault if a write is unordered with an earlier access.

        A warp may write what another warp of its CTA has just written if the value is the same (`same_value` [accesses]):
        Triton lets several warps do so where a tensor has fewer elements than the CTA has threads.
        """
        if (unordered := _unordered(self.reads.take(granules), now)).any():
            raise RaceFault(
                "write of what another warp reads with no barrier between, or of what another CTA reads",
                first(unordered),
            )
        before = self.writes.take(granules)
        unordered = _unordered(before, now)
        if same_value is not None:
            unordered &= ~same_value[:, None] | (before ^ now >= 1 << _CTA)
        if unordered.any():
            raise RaceFault(
                "write of what another warp writes with no barrier between, or of what another CTA writes",
                first(unordered),
            )

    def write(self, granules: Granules, now: Stamps, lost: Flags | None = None) -> None:
        """Log writes.

        `lost` [accesses] marks accesses whose value another lane has overwritten in the same instruction. Between
        lanes of one warp that is allowed: the hardware keeps one of the values, and Triton lets lanes store partial
        sums twice that were added in different orders.
        """
        self.writes[granules] = now
        by_others = self.writes.take(granules) ^ now
        if (conflict := by_others >= 1 << _CTA).any():
            raise RaceFault("two CTAs write to one place", first(conflict))
        if lost is not None and lost.any() and (conflict := (by_others != 0) & lost[:, None]).any():
            raise RaceFault("two warps write different values to one place in one instruction", first(conflict))

    def visible(self, granules: Granules, now: Stamps) -> Flags:
        """True for granules that were written by the stamp's own warp, or before the last barrier."""
        return ~_unordered(self.writes.take(granules), now)
