"""A run that hangs ends itself, and says which rank is behind and where it is."""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastjepa import distributed
from fastjepa.run.folder import explain_write_errors

logger = logging.getLogger(__name__)

EXIT_STATUS = 70  # EX_SOFTWARE


class Watchdog:
    """A thread of each rank that looks whether its training thread gets on, by the monotonic clock.

    Every rank writes how far it is into a folder that all share. Where one hangs all do, since they wait for it: the one
    that has got least far, or has written nothing, is to blame.

    Args:
        folder: for the heartbeats; the first rank empties it.
        seconds: without progress, after which the process ends with status 70 and the stacks of its threads.
    """

    def __init__(self, folder: Path, seconds: float, *, end: Callable[[int], Any] = os._exit) -> None:
        self._folder, self._seconds, self._end = folder, seconds, end
        self._rank, self._world = distributed.rank(), distributed.world_size()
        self._progress, self._where = 0, "starting"
        self._closed = threading.Event()
        with distributed.share_errors(), explain_write_errors(str(folder), "Choose another output_dir"):
            if self._rank == 0:
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True, exist_ok=True)
        self._thread = threading.Thread(target=self._watch, name="fastjepa-watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join()
        self._file(self._rank).unlink(missing_ok=True)

    def at(self, where: str) -> None:
        """The training thread is about to do this."""
        self._where = where
        self._progress += 1

    def _file(self, rank: int) -> Path:
        return self._folder / f"rank_{rank:05d}.json"

    def _watch(self) -> None:
        seen, since = self._progress, time.monotonic()
        self._write()
        while not self._closed.wait(min(10.0, self._seconds / 10)):
            self._write()
            if self._progress != seen:
                seen, since = self._progress, time.monotonic()
            elif time.monotonic() - since > self._seconds:
                self._bark()
                return

    def _write(self) -> None:
        beat = {"progress": self._progress, "where": self._where, "process": os.getpid(), "host": socket.gethostname()}
        temporary = self._file(self._rank).with_suffix(".tmp")
        try:
            temporary.write_text(json.dumps(beat), encoding="utf-8")
            temporary.replace(self._file(self._rank))
        except OSError as error:
            logger.debug("heartbeat: %s", error)  # a full disk stops checkpoints, not this

    def _bark(self) -> None:
        beats = {rank: self._read(rank) for rank in range(self._world)}
        least = min(-1 if beat is None else beat["progress"] for beat in beats.values())
        behind = [
            f"rank {rank}"
            + (": no sign of life" if beat is None else ": {where} (process {process} on {host})".format(**beat))
            for rank, beat in beats.items()
            if (-1 if beat is None else beat["progress"]) == least
        ]
        print(
            f"fastjepa: error (rank {self._rank}): no progress for {self._seconds:g} s (hang_timeout). This rank: "
            f"{self._where}. Least far: {'; '.join(behind)}. Start again to go on from the last checkpoint. Stacks:",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(sys.stderr)
        self._end(EXIT_STATUS)

    def _read(self, rank: int) -> dict[str, Any] | None:
        try:
            beat = json.loads(self._file(rank).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return beat if isinstance(beat, dict) and {"progress", "where", "process", "host"} <= beat.keys() else None
