"""Preemption: a signal asks the run to stop, and all ranks agree on the step after which they stop."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
import torch.distributed as dist

from fastjepa import distributed
from fastjepa.errors import Preempted

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """A context in which SIGTERM and SIGUSR1, which clusters send before they take a machine away, stop the run.

    A signal raises Preempted at once, except within `during_training`, where it is noted for `agreed`.

    Ranks get a signal at different moments, or only one rank gets it, but all must stop after the same step: otherwise the
    others would wait for ever for the one that stopped. So the ranks take the maximum of their notes once a step, over a
    gloo group of their own. The exchange begins in one step and is read in the next, so that neither host nor GPU waits.
    """

    def __init__(self) -> None:
        self._signal = 0
        self._training = False
        self._group: dist.ProcessGroup | None = None
        self._asking: tuple[dist.Work, torch.Tensor] | None = None
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers there only
            self._before = {each: signal.signal(each, self._note) for each in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for each, handler in self._before.items():
            signal.signal(each, handler)  # type: ignore[arg-type]

    @contextmanager
    def during_training(self) -> Iterator[None]:
        """Note signals instead of raising Preempted. All ranks enter it; leaving it with a note raises Preempted."""
        self._group = distributed.control_group("stop request")
        self._training = True
        try:
            yield
        finally:
            self._training = False
        if self._signal:  # the signal came too late for the ranks to agree on a step
            self._stop()

    def _note(self, number: int, _: FrameType | None) -> None:
        self._signal = number
        if not self._training:
            self._stop()

    def _stop(self) -> None:
        name = signal.Signals(self._signal).name
        raise Preempted(f"{name}: stopped outside of training. Start the same command again to go on")

    def agreed(self) -> str | None:
        """Return the name of the signal to stop for, the same on all ranks, or None.

        All ranks call it once a step, at the same place. With several ranks, a signal is reported one step later.
        """
        if self._group is None:
            number = self._signal
        else:
            number = 0
            if self._asking is not None:
                work, highest = self._asking
                work.wait()
                number = int(highest)
            mine = torch.tensor(self._signal)
            work = dist.all_reduce(mine, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
            assert work is not None
            self._asking = work, mine
        return signal.Signals(number).name if number else None
