"""Preemption: a signal asks the run to stop, and all ranks agree on the step after which they do."""

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
    """While entered, SIGTERM and SIGUSR1 (which clusters send before they take a machine away) raise Preempted, or, within
    `during_training`, are noted for all ranks to stop together.

    Ranks get a signal at different moments, or only one gets it, but all must stop after the same step, or the others would
    wait for it for ever. So the ranks sum up their notes, once a step, over a group of their own on the host: begun in one
    step and looked at in the next, so that nothing waits for it, the GPU least of all.
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
        """All ranks enter it together. Without a note it changes nothing."""
        self._group = distributed.control_group("stop request")
        self._training = True
        try:
            yield
        finally:
            self._training = False
        if self._signal:  # too late for the ranks to agree on a step
            self._stop()

    def _note(self, number: int, _: FrameType | None) -> None:
        self._signal = number
        if not self._training:
            self._stop()

    def _stop(self) -> None:
        raise Preempted(f"{signal.Signals(self._signal).name}: stopped outside of training. Start again to go on")

    def agreed(self) -> str | None:
        """Once a step, by all ranks, at the same place: the name of the signal to stop for, the same on all, or None."""
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
