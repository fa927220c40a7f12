"""The tally of a split: counts what the inspector finds in its images, and groups those with the same bytes."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any, NamedTuple

import numpy as np

from fastjepa.data.check.inspector import Found, Inspector
from fastjepa.data.dataset import ImageDataset, Ints
from fastjepa.data.threads import for_each

_IMAGES_PER_THREAD = 64  # images that each thread looks at before all are counted


class Tally:
    """What was found in one split: a few bytes for each image, and the reasons of the bad ones."""

    def __init__(self, dataset: ImageDataset) -> None:
        self.dataset = dataset
        self.sizes = np.zeros((len(dataset), 2), np.int32)
        """[n, 2]: height and width; 0 for an image that is bad or was not seen."""
        self.digests = np.zeros((len(dataset), 2), np.uint64)
        """[n, 2]: `Found.digest`."""
        self.kinds: Counter[str] = Counter()
        self.animated = self.rotated = self.num_bytes = 0
        self.largest_file = (0, 0)
        """Bytes, and index of the image."""
        self.bad: dict[int, str] = {}
        """Index -> reason."""
        self.damaged: dict[int, str] = {}
        """Index -> `Found.damage`."""

    @property
    def usable(self) -> Ints:
        """The indices of usable images, int64, ascending."""
        return np.flatnonzero(self.sizes[:, 0])

    @property
    def seen(self) -> int:
        """The number of images that were looked at."""
        return sum(self.kinds.values()) + len(self.bad)

    def scan(
        self,
        inspect: Inspector,
        pool: Executor,
        num_threads: int,
        stop: threading.Event,
        progress: Callable[[int], None],
    ) -> None:
        """Look at all images, or until `stop` is set.

        Args:
            inspect: looks at one image.
            pool: num_threads threads.
            num_threads: the threads that share the work.
            stop: ends the work early when it is set.
            progress: called now and then with the number of images that were counted since the last call.
        """
        chunk = _IMAGES_PER_THREAD * num_threads
        for start in range(0, len(self.dataset), chunk):
            before = self.seen
            self._scan_chunk(range(start, min(start + chunk, len(self.dataset))), inspect, pool, num_threads, stop)
            progress(self.seen - before)
            if stop.is_set():
                return

    def _scan_chunk(
        self, indices: range, inspect: Inspector, pool: Executor, num_threads: int, stop: threading.Event
    ) -> None:
        found: list[Found | None] = [None] * len(indices)

        def look(position: int) -> None:
            if not stop.is_set():
                found[position] = inspect(self.dataset, indices[position])

        bad = for_each(look, len(indices), pool, num_threads)
        self.bad |= {indices[position]: reason for position, reason in bad.items()}
        for index, image in zip(indices, found, strict=True):
            if image is not None:
                self._add(index, image)

    def _add(self, index: int, image: Found) -> None:
        self.sizes[index] = image.height, image.width
        self.digests[index] = np.frombuffer(image.digest, np.uint64)
        self.kinds[image.kind] += 1
        self.animated += image.animated
        self.rotated += image.rotated
        self.num_bytes += image.num_bytes
        self.largest_file = max(self.largest_file, (image.num_bytes, index))
        if image.damage is not None:
            self.damaged[index] = image.damage


class SameBytes(NamedTuple):
    """Groups of images with the same bytes, among n images."""

    order: Ints
    """int64 [n]: all positions; those of images with the same bytes stand side by side, ascending."""
    starts: Ints
    """int64 [g]: where each group of two or more starts in `order`; the groups are sorted by their first position."""
    ends: Ints
    """int64 [g]: where each group ends."""


def same_bytes(digests: np.ndarray[Any, np.dtype[np.uint64]]) -> SameBytes:
    """Group images by their digests, uint64 [n, 2]."""
    order = np.lexsort(digests.T)  # stable
    digests = digests[order]
    edges = np.flatnonzero(np.concatenate([[True], (digests[1:] != digests[:-1]).any(1), [True]]))
    groups = np.flatnonzero(np.diff(edges) > 1)
    groups = groups[np.argsort(order[edges[groups]])]
    return SameBytes(order, edges[groups], edges[groups + 1])
