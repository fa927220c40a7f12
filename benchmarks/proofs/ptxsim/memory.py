"""The memory of a launch: the tensors passed to it, and the shared memory of the CTAs that run together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.proofs.ptxsim.faults import MisalignedFault, OutOfBoundsFault, PendingFault, blame, first
from benchmarks.proofs.ptxsim.races import AccessLog, Stamps, by_all_warps

Array = npt.NDArray[Any]
Index = npt.NDArray[np.int64]


LARGEST_LOGGED = 1 << 28
"""Bytes of the largest tensor that is watched for races. Its log takes several times as much."""


def word_view(data: npt.NDArray[np.uint8], size: int) -> Array:
    """View bytes as rows of `size` bytes, in words as wide as possible (up to 8 bytes)."""
    word = min(size, 8)
    return data[: data.size // size * size].view(f"u{word}").reshape(-1, size // word)


def _check_alignment(address: Index, size: int, what: str) -> None:
    if (misaligned := address & (size - 1) != 0).any():
        raise MisalignedFault(f"{what} of {size} bytes at a misaligned address", first(misaligned))


def _granules(row: Index, size: int, granule: int) -> Index:
    """Granules [accesses, granules of an access] of aligned accesses, given by their index in units of `size`."""
    per_row = size // granule
    return (row * per_row)[:, None] + np.arange(per_row) if per_row > 1 else row[:, None]


@dataclass
class _Region:
    """Tensors of one storage that overlap in memory."""

    names: list[str]
    start: int
    data: npt.NDArray[np.uint8]
    """The bytes from the first to the last of the tensors."""
    tensors: list[torch.Tensor]
    allowed: npt.NDArray[np.bool_] | None = None
    """True for the bytes that belong to a tensor; None: all do."""
    log: AccessLog | None = None
    views: dict[int, tuple[int, Array]] = field(default_factory=dict)

    def rows(self, size: int) -> tuple[int, Array]:
        """The first address that is a multiple of `size`, and the data from there in rows of `size` bytes."""
        if size not in self.views:
            padding = -self.start % size
            self.views[size] = self.start + padding, word_view(self.data[padding:], size)
        return self.views[size]

    def mark_allowed(self) -> None:
        """Set `allowed`."""
        if any(tensor.numel() * tensor.element_size() == self.data.size for tensor in self.tensors):
            return  # one tensor fills the region
        allowed = np.zeros(self.data.size, np.bool_)
        for tensor in self.tensors:
            size = tensor.element_size()
            strides = [stride * size for stride in tensor.stride()]
            shape, offset = tuple(tensor.shape), tensor.data_ptr() - self.start
            np.lib.stride_tricks.as_strided(allowed[offset:], (*shape, size), (*strides, 1))[...] = True
        self.allowed = None if allowed.all() else allowed


class GlobalMemory:
    """The tensors that a launch may touch, to the byte; any other address faults."""

    def __init__(self, tensors: dict[str, torch.Tensor], granule: int, *, find_races: bool) -> None:
        """
        Args:
            tensors: the tensors by name.
            granule: bytes of the smallest access.
            find_races: whether to log who reads and writes.
        """
        self.granule = granule
        self.regions: list[_Region] = []
        for name, tensor in sorted(tensors.items(), key=lambda item: item[1].data_ptr()):
            if tensor.numel():
                self._add(name, tensor)
        for region in self.regions:
            region.mark_allowed()
            if find_races and region.data.size <= LARGEST_LOGGED:
                region.log = AccessLog(region.data.size // granule + 2)
        self._starts = [region.start for region in self.regions]

    def _add(self, name: str, tensor: torch.Tensor) -> None:
        start = tensor.data_ptr()
        span = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        end = start + span * tensor.element_size()
        names, tensors = [name], [tensor]
        if self.regions and start < self.regions[-1].start + self.regions[-1].data.size:
            last = self.regions.pop()
            start, end = last.start, max(end, last.start + last.data.size)
            names, tensors = [*last.names, name], [*last.tensors, tensor]
        storage = tensor.untyped_storage()
        storage_bytes: npt.NDArray[np.uint8] = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
        data = storage_bytes[start - storage.data_ptr() : end - storage.data_ptr()]
        self.regions.append(_Region(names, start, data, tensors))

    def load(self, address: Index, size: int, stamps: Stamps) -> Array:
        """Load `size` bytes from each address: [accesses, words], as `word_view` makes words."""
        loaded = np.empty((address.size, max(size // 8, 1)), f"u{min(size, 8)}")
        for which, region, row in self._locate(address, size, "load"):
            if region.log:
                with blame(which):
                    granules = self._region_granules(region, row, size)
                    region.log.read(granules, stamps[which, None], initialised=False)
            loaded[which] = region.rows(size)[1].take(row, axis=0)
        return loaded

    def store(self, address: Index, data: Array, stamps: Stamps) -> None:
        size = data.shape[1] * data.itemsize
        for which, region, row in self._locate(address, size, "store"):
            rows, wanted = region.rows(size)[1], data[which]
            if region.log:
                with blame(which):
                    granules = self._region_granules(region, row, size)
                    region.log.check_write(granules, stamps[which, None], ~_differ(rows[row], wanted))
                    rows[row] = wanted
                    region.log.write(granules, stamps[which, None], _differ(rows[row], wanted))
            else:
                rows[row] = wanted

    def _region_granules(self, region: _Region, row: Index, size: int) -> Index:
        offset = region.rows(size)[0] // self.granule - region.start // self.granule
        return _granules(row, size, self.granule) + offset

    def _locate(self, address: Index, size: int, what: str) -> list[tuple[Index, _Region, Index]]:
        """Find accesses: for every region, (indices of the accesses, the region, their rows in it)."""
        _check_alignment(address, size, what)
        if not self.regions:
            raise OutOfBoundsFault(f"{what} of {size} bytes, but no tensor has elements")
        regions = np.searchsorted(self._starts, address, "right") - 1
        pieces = []
        for i in np.unique(regions):
            which = np.flatnonzero(regions == i)
            region = self.regions[max(i, 0)]
            start, rows = region.rows(size)
            row = (address[which] - start) // size
            outside = (row < 0) | (row >= len(rows))
            if region.allowed is not None and not outside.any():
                byte = row[:, None] * size + (start - region.start) + np.arange(size)
                outside = ~region.allowed[byte].all(axis=1)
            if outside.any():
                access = int(which[first(outside)])
                message = f"{what} of {size} bytes outside the tensors: {self._nearest(int(address[access]))}"
                raise OutOfBoundsFault(message, access)
            pieces.append((which, region, row))
        return pieces

    def _nearest(self, address: int) -> str:
        """Describe an address relative to the nearest tensors."""

        def distance(region: _Region) -> int:
            return max(region.start - address, address - region.start - region.data.size, 0)

        region = min(self.regions, key=distance)
        return f"offset {address - region.start} of the {region.data.size} bytes of {', '.join(region.names)}"


def _differ(there: Array, wanted: Array) -> npt.NDArray[np.bool_]:
    """True for each access that finds other data than `wanted`."""
    different: npt.NDArray[np.bool_] = (there != wanted).any(axis=1)
    return different


class SharedMemory:
    """Shared memory of several CTAs. An address counts from the start of its CTA's memory; `slot` is the CTA's index."""

    def __init__(self, size: int, ctas: int, granule: int) -> None:
        self.size, self.granule = size, granule
        self.stride = -(-size // 128) * 128
        self.data = np.full(self.stride * ctas, 0xFF, np.uint8)  # NaN, so that uninitialised reads show
        granules = self.data.size // granule
        self.log = AccessLog(granules)
        self.landing = np.zeros(granules, np.bool_)
        """True for granules that an asynchronous copy is writing."""
        self._copying = 0  # number of these copies
        self.feeding = np.zeros(granules, np.int32)
        """Number of asynchronous matrix products that are reading a granule."""
        self.unfenced = np.zeros(granules, np.bool_)
        """True for granules written by ordinary stores, which matrix products may not see before a proxy fence."""

    def load(self, slot: Index, address: Index, size: int, stamps: Stamps) -> Array:
        row = self._locate(slot, address, size, "load")
        self._note_read(_granules(row, size, self.granule), stamps[:, None])
        return word_view(self.data, size).take(row, axis=0)

    def store(self, slot: Index, address: Index, data: Array, stamps: Stamps) -> None:
        size = data.shape[1] * data.itemsize
        row, rows = self._locate(slot, address, size, "store"), word_view(self.data, size)
        self._check_write(row, size, stamps, ~_differ(rows[row], data))
        self._write(row, data, stamps)

    def begin_copy(self, slot: Index, address: Index, size: int, stamps: Stamps) -> Index:
        """Start an asynchronous copy; return the rows that `end_copy` fills."""
        row = self._locate(slot, address, size, "asynchronous copy")
        self._check_write(row, size, stamps, None)
        self.landing[_granules(row, size, self.granule)] = True
        self._copying += row.size
        return row

    def end_copy(self, row: Index, data: Array, stamps: Stamps) -> None:
        self.landing[_granules(row, data.shape[1] * data.itemsize, self.granule)] = False
        self._copying -= row.size
        self._write(row, data, stamps)

    def begin_products(self, slot: Index, address: Index, stamps: Stamps) -> tuple[Array, Index]:
        """Start asynchronous matrix products, which read units of 16 bytes, each for a warpgroup.

        Returns:
            The units [accesses, words], and their granules [accesses, granules].
        """
        row = self._locate(slot, address, 16, "matrix operand")
        granules = _granules(row, 16, self.granule)
        if (unfenced := self.unfenced.take(granules)).any():
            raise PendingFault(
                "matrix operand written by ordinary stores, with no fence.proxy.async since", first(unfenced)
            )
        self._note_read(granules, by_all_warps(stamps)[:, None])
        np.add.at(self.feeding, granules, 1)
        return word_view(self.data, 16).take(row, axis=0), granules

    def end_products(self, granules: list[Index], stamp: Stamps) -> None:
        """End the products of a warpgroup that has waited.

        Each of its warps may have read until now, and knows only that its own part is done.
        """
        for read in granules:
            self.feeding[read] -= 1  # the granules of one operand are all different
            self.log.reads[read] = by_all_warps(stamp)

    def fence(self, slots: Index, stamps: Stamps) -> None:
        """Make the ordinary stores that these warps can see visible to matrix products."""
        granules = np.flatnonzero(self.unfenced)
        owner = granules * self.granule // self.stride
        for slot, now in zip(slots, stamps, strict=True):
            mine = granules[owner == slot]
            self.unfenced[mine[self.log.visible(mine, now)]] = False

    def _check_write(self, row: Index, size: int, stamps: Stamps, same_value: npt.NDArray[np.bool_] | None) -> None:
        granules = _granules(row, size, self.granule)
        self._check_landed(granules)
        if self.feeding.any() and (fed := self.feeding.take(granules) > 0).any():
            raise PendingFault("write of what an asynchronous matrix product still reads", first(fed))
        self.log.check_write(granules, stamps[:, None], same_value)

    def _write(self, row: Index, data: Array, stamps: Stamps) -> None:
        size = data.shape[1] * data.itemsize
        granules, rows = _granules(row, size, self.granule), word_view(self.data, size)
        rows[row] = data
        self.log.write(granules, stamps[:, None], _differ(rows[row], data))
        self.unfenced[granules] = True

    def _note_read(self, granules: Index, stamps: Stamps) -> None:
        self._check_landed(granules)
        self.log.read(granules, stamps, initialised=True)

    def _check_landed(self, granules: Index) -> None:
        if self._copying and (landing := self.landing.take(granules)).any():
            raise PendingFault(
                "access to the destination of an asynchronous copy before the wait for it", first(landing)
            )

    def _locate(self, slot: Index, address: Index, size: int, what: str) -> Index:
        _check_alignment(address, size, f"shared-memory {what}")
        if (outside := (address < 0) | (address + size > self.size)).any():
            where = first(outside)
            message = f"shared-memory {what} of {size} bytes at address {address[where]} of {self.size} bytes"
            raise OutOfBoundsFault(message, where)
        return (slot * self.stride + address) // size
