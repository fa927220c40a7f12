"""The watchdog: it ends a run that makes no progress, and says which rank is behind and where that rank is."""

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
    """A thread beside the training thread of each rank, which ends the process when training makes no progress.

    Every rank writes heartbeats, files that tell how far it is, into a folder that all ranks share. If one rank hangs, all
    do, because they wait for it: the culprit is the rank that has got least far, or has written no heartbeat.

    Args:
        folder: folder of the heartbeats; the first rank empties it.
        seconds: time without progress, by the monotonic clock, after which the process prints the stacks of its threads and
            ends with status 70.
        end: ends the process with a status.

    Raises:
        RunFolderError: the folder cannot be made.
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
        """Tell the watchdog what the training thread is about to do. Each call counts as progress."""
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
                self._end_run()
                return

    def _write(self) -> None:
        beat = {"progress": self._progress, "where": self._where, "process": os.getpid(), "host": socket.gethostname()}
        temporary = self._file(self._rank).with_suffix(".tmp")
        try:
            temporary.write_text(json.dumps(beat), encoding="utf-8")
            temporary.replace(self._file(self._rank))
        except OSError as error:
            logger.debug("heartbeat: %s", error)  # a full disk must not end training

    def _end_run(self) -> None:
        beats = {rank: self._read(rank) for rank in range(self._world)}
        least = min(-1 if beat is None else beat["progress"] for beat in beats.values())
        behind = [
            f"rank {rank}"
            + (": no heartbeat" if beat is None else ": {where} (process {process} on {host})".format(**beat))
            for rank, beat in beats.items()
            if (-1 if beat is None else beat["progress"]) == least
        ]
        print(
            f"fastjepa: error (rank {self._rank}): no progress for {self._seconds:g} s (hang_timeout). This rank: "
            f"{self._where}. Least far: {'; '.join(behind)}. Start the same command again to go on from the last "
            "checkpoint. Stacks of this rank:",
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
