"""Decides when and how checkpoints are saved (in the background where that is safe) and which older ones are kept."""

from __future__ import annotations

import logging
import socket
import threading
from pathlib import Path

from torch import Tensor

from fastjepa import distributed
from fastjepa.checkpoint import writer
from fastjepa.checkpoint.format import RunState, latest_for_message, newest_first, step_of
from fastjepa.checkpoint.writer import Snapshot
from fastjepa.errors import CheckpointError
from fastjepa.host import GIB, free_memory
from fastjepa.optim.sharded_state import ShardedState

logger = logging.getLogger(__name__)

MEMORY_MARGIN = 1.25


class Checkpointer:
    """Saves checkpoints below `folder`, one at a time. All ranks hold one and make the same calls.

    Args:
        keep_last: how many of the newest ones are kept.
        keep_every: those whose step is a multiple of this are kept as well; None: no others.
        asynchronous: copy the state to host memory and write it in a thread while training goes on. If there is too little
            free memory for the copy, training waits instead, which is logged once.
    """

    def __init__(self, folder: Path, *, keep_last: int, keep_every: int | None, asynchronous: bool) -> None:
        self._folder, self._keep_last, self._keep_every = folder, keep_last, keep_every
        self._asynchronous = asynchronous
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._pinned: dict[str, Tensor] = {}
        # The thread has a process group of its own, so that its messages do not come between those of training.
        self._group = distributed.control_group("checkpoints")

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Wait for a save that is going on, whatever ends the run."""
        try:
            self.wait()
        except RuntimeError as error:  # messages failed because a rank is gone; the error that ended the run counts
            if kind is None:
                raise
            logger.error("the save that was going on failed: %s", distributed.reason_of(error))

    def save(self, sharded: ShardedState, state: RunState, *, last: bool) -> None:
        """Save the state of training now; waits for the save before this one.

        A save that fails is logged and the run goes on, unless it is the `last` one, which is also waited for.

        Raises:
            CheckpointError: the last one could not be written.
        """
        self.wait()
        snapshot = Snapshot.of(sharded, state)
        if not last and self._asynchronous and self._fits(snapshot.bytes_to_copy(self._pinned)):
            with distributed.share_errors(
                self._group
            ):  # not in the default one: on GPUs that would wait for the copies
                snapshot = snapshot.copied(self._pinned)
            self._thread = threading.Thread(target=self._write, args=(snapshot,), name="checkpoint", daemon=True)
            self._thread.start()
            return
        self._write(snapshot)
        error, self._error = self._error, None
        if isinstance(error, CheckpointError) and not last:
            self._log(error)
        elif error is not None:
            raise error

    def wait(self) -> None:
        """Wait until no save is going on. A failed save is logged here, not in its thread, so that it is seen in order."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if isinstance(error, CheckpointError):
            self._log(error)
        elif error is not None:
            raise error

    def _log(self, error: CheckpointError) -> None:
        if distributed.rank() == 0:
            newest = latest_for_message(self._folder)
            logger.error("%s: newest is %s. The run goes on and saves again later", error, newest)

    def _write(self, snapshot: Snapshot) -> None:
        try:
            path = writer.write(self._folder, snapshot, self._group)
            if distributed.rank() == 0:
                logger.info("checkpoint %s", path)
                self._delete_old(path)
        except Exception as error:  # noqa: BLE001  # this is a thread: the next wait() raises it
            self._error = error

    def _delete_old(self, newest: Path) -> None:
        try:
            old = newest_first(newest.parent)[self._keep_last :]
        except (OSError, CheckpointError) as error:
            logger.warning("older checkpoints than %s are kept: %s", newest, error)
            return
        for path in old:
            step = step_of(path)
            assert step is not None
            if self._keep_every is None or step % self._keep_every:
                try:
                    writer.delete(path)
                except OSError as error:  # harms nothing that is kept, and is tried again at the next save
                    logger.warning("could not delete checkpoint %s: %s", path, error)

    def _fits(self, size: int) -> bool:
        """True if copies of all ranks' states fit into the memory of their machines: the same answer on all ranks."""
        machines: dict[str, tuple[int, int]] = {}
        for host, needed, free in distributed.gather_objects((socket.gethostname(), size, free_memory())):
            before = machines.get(host, (0, free))
            machines[host] = before[0] + needed, min(before[1], free)
        for host, (needed, free) in machines.items():
            if free < MEMORY_MARGIN * needed:
                if distributed.rank() == 0:
                    logger.warning(
                        "training waits while checkpoints are written: a copy of the state needs %.2f GiB on %s, where "
                        "%.2f GiB are free",
                        MEMORY_MARGIN * needed / GIB,
                        host,
                        free / GIB,
                    )
                self._asynchronous = False
                return False
        return True
