"""What a run reports: sums since the last line of metrics, kept on the device until the line is due."""

from __future__ import annotations

import logging
import resource
import sys
import time

import torch
from torch import Tensor

from fastjepa import distributed
from fastjepa.data import Seconds

logger = logging.getLogger(__name__)


class Meter:
    """Sums since the last line. The loss stays on the device: nothing is read back until a line is due."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._reset(time.perf_counter())

    def _reset(self, now: float) -> None:
        self._started = now
        self._loss = torch.zeros((), dtype=torch.float64, device=self._device)
        self._finite = torch.zeros((), dtype=torch.float64, device=self._device)
        self._micro_batches = self._images = self._context_tokens = self._target_tokens = 0
        self._data_wait = 0.0
        self._data_seconds = [0.0] * len(Seconds._fields)

    def restart_clock(self) -> None:
        """Leave the time since the last summary out: it went into a checkpoint."""
        self._started = time.perf_counter()

    def update_data(self, waited: float, seconds: Seconds) -> None:
        """A micro batch arrived: how long the step waited for it, and what preparing it took, beside the step."""
        self._data_wait += waited
        self._data_seconds = [total + new for total, new in zip(self._data_seconds, seconds, strict=True)]

    def update(self, loss: Tensor, *, images: int, context_tokens: int, target_tokens: int) -> None:
        finite = loss.isfinite()
        self._loss += torch.where(finite, loss, 0)  # the mean of those that trained something
        self._finite += finite
        self._micro_batches += 1
        self._images += images
        self._context_tokens += context_tokens
        self._target_tokens += target_tokens

    def summary(self) -> dict[str, float | None]:
        """Means and rates over all ranks since the last call (memory: of this rank). All ranks call it; it starts anew.

        The loss is that of the micro batches whose loss was finite; None if there was none.
        """
        tokens = (self._context_tokens, self._target_tokens)
        counts = (self._micro_batches, self._images, *tokens, 1, self._data_wait, *self._data_seconds)
        counted = torch.tensor(counts, dtype=torch.float64, device=self._device)
        sums = torch.cat([self._loss[None], self._finite[None], counted])
        loss, finite, micro_batches, images, context, targets, ranks, waited, *prepared = distributed.sum_over_ranks(
            sums
        )
        # Only now: reading the sums back is what waits for a GPU to finish the steps that are being timed.
        now = time.perf_counter()
        seconds = now - self._started
        self._reset(now)
        return {
            "loss": loss / finite if finite else None,
            "images_per_second": images / seconds,
            "tokens_per_second": (context + targets) / seconds,
            "data_wait": waited / ranks / seconds,
            **{f"{name}_ms": 1e3 * each / micro_batches for name, each in zip(Seconds._fields, prepared, strict=True)},
            "context_tokens": context / images,
            "target_tokens": targets / images,
            "memory_gib": peak_memory(self._device) / 2**30,
        }


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that was allocated on the GPU, or resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
