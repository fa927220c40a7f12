"""The progress of a run on the terminal: a bar, or plain lines where the output goes to a file."""

from __future__ import annotations

import logging
import math
import sys
import time
from typing import Any

from tqdm import tqdm

logger = logging.getLogger(__name__)


class Progress:
    """A bar on a terminal, plain lines elsewhere, both with the time left.

    Args:
        start: number of steps that were done before this process.
        total: number of steps of the run.
        enabled: print at all; the trainer enables the first rank alone.
    """

    def __init__(self, start: int, total: int, *, enabled: bool) -> None:
        self._enabled, self._start, self._total = enabled, start, total
        self._started = time.perf_counter()
        on_terminal = enabled and sys.stderr.isatty()
        self._bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True) if on_terminal else None

    def advance(self) -> None:
        """Move on by one step."""
        if self._bar is not None:
            self._bar.update()

    def report(self, values: dict[str, Any]) -> None:
        """Show the figures of a line of metrics."""
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
    """Write seconds as hours:minutes:seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
