"""What a run reports: one JSON line per logging interval, and its progress on the terminal."""

from __future__ import annotations

import json
import logging
import math
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fastjepa import distributed
from fastjepa.data import Seconds
from fastjepa.errors import described
from fastjepa.run_folder import writing

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


class MetricsFile:
    """metrics.jsonl: one JSON object per line, flushed as it is written.

    A run that resumes at step `first_step` drops the lines of later steps, which it is about to write again, and those that
    are damaged, which is logged.

    Raises:
        RunFolderError: the file cannot be written (disk full, no permission).
    """

    def __init__(self, path: Path, first_step: int) -> None:
        self._path = path
        temporary = path.with_name(f".{path.name}.tmp")
        with writing(str(self._path), "Checkpoints are intact"):
            temporary.write_bytes(b"".join(line + b"\n" for line in _lines_up_to(first_step, path)))
            temporary.replace(path)
            self._file = path.open("a", encoding="utf-8")

    def write(self, values: dict[str, Any]) -> None:
        with writing(str(self._path), "Checkpoints are intact"):
            self._file.write(json.dumps(values) + "\n")
            self._file.flush()

    def close(self) -> None:
        self._file.close()


def _lines_up_to(step: int, path: Path) -> Iterator[bytes]:
    """Of a run that may have been killed while writing the last line, or whose disk lost some."""
    complete = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    for number, line in enumerate(complete, 1):
        try:
            if json.loads(line)["step"] <= step:
                yield line
        except (ValueError, KeyError, TypeError) as error:
            logger.warning("%s: line %d is damaged and left out (%s)", path, number, described(error))


class Progress:
    """A bar with the time left on a terminal, plain lines elsewhere; silent on all ranks but the first."""

    def __init__(self, start: int, total: int, *, enabled: bool) -> None:
        self._enabled, self._start, self._total = enabled, start, total
        self._started = time.perf_counter()
        on_terminal = enabled and sys.stderr.isatty()
        self._bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True) if on_terminal else None

    def advance(self) -> None:
        if self._bar is not None:
            self._bar.update()

    def report(self, values: dict[str, Any]) -> None:
        """Show the line of metrics that was just written."""
        if not self._enabled:
            return
        loss = math.nan if values["loss"] is None else values["loss"]
        figures = (
            f"loss {loss:.4f}  lr {values['lr']:.2e}  {values['images_per_second']:,.0f} images/s  "
            f"data wait {values['data_wait']:.0%}"
        )
        if self._bar is not None:
            self._bar.set_postfix_str(figures)
            return
        done = values["step"]
        left = (time.perf_counter() - self._started) / (done - self._start) * (self._total - done)
        print(f"step {done}/{self._total}  {figures}  {_clock(left)} left", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
