"""The figures of a line of metrics: sums since the last line, kept on the device until a line is due."""

from __future__ import annotations

import resource
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from fastjepa import distributed
from fastjepa.host import GIB


class Meter:
    """Sums since the last line. Loss and signals stay on the device: nothing is read back until a line is due.

    The names of signals, counts and seconds must be the same on all ranks and for all micro batches of a line.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._reset(time.perf_counter(), signals=())

    def _reset(self, now: float, signals: tuple[str, ...]) -> None:
        self._started = now
        self._signals = signals
        # One element for the loss, then one for each signal: the sum of its finite values, and how many there were.
        self._sums = torch.zeros(1 + len(signals), dtype=torch.float64, device=self._device)
        self._finite = torch.zeros_like(self._sums)
        self._micro_batches = self._images = 0
        self._counts: defaultdict[str, int] = defaultdict(int)
        self._data_wait = 0.0
        self._data_seconds: defaultdict[str, float] = defaultdict(float)

    def restart_clock(self) -> None:
        """Leave the time since the last summary out of the rates: it went into a checkpoint."""
        self._started = time.perf_counter()

    def update_data(self, waited: float, seconds: Mapping[str, float]) -> None:
        """Add what loading a micro batch took.

        Args:
            waited: seconds that the step waited for the micro batch.
            seconds: name of a stage of its preparation -> seconds, most of which passed beside earlier steps.
        """
        self._data_wait += waited
        for name, value in seconds.items():
            self._data_seconds[name] += value

    def update(self, loss: Tensor, signals: Mapping[str, Tensor], *, images: int, counts: Mapping[str, int]) -> None:
        """Add a micro batch.

        Args:
            loss: a detached scalar on the device.
            signals: name -> detached scalar on the device.
            images: number of images.
            counts: name -> number of tokens of that kind.
        """
        if tuple(signals) != self._signals:
            assert not self._micro_batches, (
                f"signals {tuple(signals)}: expected {self._signals} up to the end of the line"
            )
            self._signals = tuple(signals)
            self._sums = self._sums.new_zeros(1 + len(signals))
            self._finite = torch.zeros_like(self._sums)
        values = torch.stack([loss, *signals.values()])
        finite = values.isfinite()
        self._sums += torch.where(finite, values, 0)  # a loss that is not finite trained nothing
        self._finite += finite
        self._micro_batches += 1
        self._images += images
        for name, count in counts.items():
            self._counts[name] += count

    def summary(self) -> dict[str, float | None]:
        """Return means and rates since the last call, and start anew. All ranks call it.

        The figures are those of all ranks, but for memory_gib, which is this rank's. Loss and signals are means over the
        micro batches in which they were finite; None if there were none. Each count is a mean per image.
        """
        counts, data = self._counts, self._data_seconds
        host = [self._micro_batches, self._images, *counts.values(), 1, self._data_wait, *data.values()]
        host_sums = torch.tensor(host, dtype=torch.float64, device=self._device)
        sums = iter(distributed.sum_over_ranks(torch.cat([self._sums, self._finite, host_sums])))

        def take(number: int) -> list[float]:
            return list(islice(sums, number))

        # Read the clock only now: reading the sums back waits until the GPU has finished the steps that are being timed.
        now = time.perf_counter()
        elapsed = now - self._started
        values = 1 + len(self._signals)
        loss, *means = (total / n if n else None for total, n in zip(take(values), take(values), strict=True))
        signals = dict(zip(self._signals, means, strict=True))
        micro_batches, images = take(2)
        tokens = dict(zip(counts, take(len(counts)), strict=True))
        ranks, waited = take(2)
        seconds = dict(zip(data, take(len(data)), strict=True))
        line = join(
            {
                "loss": loss,
                "images_per_second": images / elapsed,
                "tokens_per_second": sum(tokens.values()) / elapsed,
                "data_wait": waited / ranks / elapsed,
            },
            {f"{name}_ms": 1e3 * total / micro_batches for name, total in seconds.items()},
            {name: total / images for name, total in tokens.items()},
            {"memory_gib": peak_memory(self._device) / GIB},
            signals,
        )
        self._reset(now, self._signals)
        return line


def join(*figures: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of a line, in the order given.

    Raises:
        ValueError: two of them have the same name, so that one would be lost.
    """
    names = Counter(name for part in figures for name in part)
    if twice := [name for name, times in names.items() if times > 1]:
        raise ValueError(f"two figures of a line of metrics have the same name: {', '.join(twice)}")
    return {name: value for part in figures for name, value in part.items()}


def peak_memory(device: torch.device) -> int:
    """Largest number of bytes that was allocated on the GPU or, on a CPU, that was resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
