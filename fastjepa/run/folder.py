"""The folder of a run: its resolved configuration, metrics and checkpoints."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastjepa import distributed
from fastjepa.errors import RunFolderError

logger = logging.getLogger(__name__)


@contextmanager
def explain_write_errors(what: str, advice: str) -> Iterator[None]:
    """Turns a failed write into a RunFolderError that says what could not be written, why, and what to do."""
    try:
        yield
    except OSError as error:
        raise RunFolderError(f"{what}: cannot be written ({error.strerror}). {advice}") from error


class RunFolder:
    """config.yaml, metrics.jsonl, bad_samples.jsonl, skipped_steps.jsonl, evaluation.json, checkpoints/, profile/ below one
    path."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.bad_samples = self.path / "bad_samples.jsonl"
        self.skipped_steps = self.path / "skipped_steps.jsonl"
        self.heartbeats = self.path / ".heartbeats"
        self.evaluation = self.path / "evaluation.json"
        self.checkpoints = self.path / "checkpoints"
        self.profile = self.path / "profile"

    def create(self) -> None:
        """Make the folder.

        Raises:
            RunFolderError: it cannot be made.
        """
        with explain_write_errors(f"output_dir = {self.path}", "Choose another output_dir"):
            self.checkpoints.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder: the first rank calls it. The lock ends with the process, however that ends.

        Raises:
            RunFolderError: another run, here or on another machine, holds it.
        """
        path = self.path / ".lock"
        # lockf, not flock: it works across the machines that share a folder by NFS, and no child process inherits it.
        with explain_write_errors(f"output_dir = {self.path}", "Choose another output_dir"):
            file = path.open("a+b", buffering=0)  # closing it writes nothing: a full disk is one error
        with file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError) as error:
                file.seek(0)
                holder = file.read().decode(errors="replace").strip() or "unknown"
                raise RunFolderError(
                    f"output_dir = {self.path}: another run is writing there ({holder}). "
                    "Stop it, or choose another output_dir"
                ) from error
            except OSError as error:
                logger.warning("%s: no lock on this file system (%s): start one run at a time there", path, error)
            with explain_write_errors(f"output_dir = {self.path}", "Choose another output_dir"):
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
            yield

    def write_skipped_steps(self, lines: list[dict[str, object]]) -> None:
        """Add lines to skipped_steps.jsonl.

        Raises:
            RunFolderError: the folder cannot be written to.
        """
        with (
            explain_write_errors(str(self.skipped_steps), "Choose another output_dir"),
            self.skipped_steps.open("a", encoding="utf-8") as file,
        ):
            file.writelines(json.dumps(line) + "\n" for line in lines)

    def check_shared(self) -> None:
        """All ranks call it: on machines that do not share the folder, each would keep a part of every checkpoint.

        Raises:
            RunFolderError: the ranks see different folders.
        """
        # A file of a name never asked for before, so that no machine remembers that it is not there.
        mark = self.path / f".shared_{distributed.gather_objects(secrets.token_hex(8))[0]}"
        first = distributed.rank() == 0
        with distributed.share_errors(), explain_write_errors(f"output_dir = {self.path}", "Choose another output_dir"):
            if first:
                mark.touch()
        seen = distributed.gather_objects(mark.exists())
        if first:
            mark.unlink()
        if not all(seen):
            raise RunFolderError(
                f"output_dir = {self.path}: expected one folder that all machines of the run share, but rank "
                f"{seen.index(False)} does not see there what rank 0 wrote"
            )

    def write_config(self, text: str) -> None:
        """Write the resolved configuration, once it is known to fit the run that the folder holds.

        Raises:
            RunFolderError: the folder cannot be written to.
        """
        with explain_write_errors(f"output_dir = {self.path}", "Choose another output_dir"):
            self.config.write_text(text, encoding="utf-8")

    def write_evaluation(self, text: str) -> None:
        """Write the figures of the evaluation.

        Raises:
            RunFolderError: the folder cannot be written to.
        """
        with explain_write_errors(f"output_dir = {self.path}", "Choose another output_dir"):
            self.evaluation.write_text(text, encoding="utf-8")
