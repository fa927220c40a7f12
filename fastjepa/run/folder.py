"""The run folder: the paths of its files, the lock on it, and the check that all machines share it."""

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
    """Turn an OSError of the block into a RunFolderError: `what` cannot be written, the reason, and the `advice`."""
    try:
        yield
    except OSError as error:
        raise RunFolderError(f"{what}: cannot be written ({error.strerror}). {advice}") from error


class RunFolder:
    """The files and folders of a run below one path, its `output_dir`."""

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
        """Make the folder, if it is not there.

        Raises:
            RunFolderError: the folder cannot be made.
        """
        with explain_write_errors(f"output_dir = {self.path}", "Choose another output_dir"):
            self.checkpoints.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for this run. The first rank calls it; the lock ends with the process, however that ends.

        Raises:
            RunFolderError: another run, on this machine or another one, holds the folder; or it cannot be written to.
        """
        path = self.path / ".lock"
        # lockf, not flock: it works between machines that share the folder by NFS, and child processes do not inherit it.
        with explain_write_errors(f"output_dir = {self.path}", "Choose another output_dir"):
            file = path.open("a+b", buffering=0)  # unbuffered: closing writes nothing, so a full disk is reported once
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
                logger.warning(
                    "%s: this file system has no locks (%s): make sure that only one run uses the folder", path, error
                )
            with explain_write_errors(f"output_dir = {self.path}", "Choose another output_dir"):
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
            yield

    def write_skipped_steps(self, lines: list[dict[str, object]]) -> None:
        """Append lines to skipped_steps.jsonl.

        Raises:
            RunFolderError: the folder cannot be written to.
        """
        with (
            explain_write_errors(str(self.skipped_steps), "Choose another output_dir"),
            self.skipped_steps.open("a", encoding="utf-8") as file,
        ):
            file.writelines(json.dumps(line) + "\n" for line in lines)

    def check_shared(self) -> None:
        """Check that all ranks see the same folder; all ranks call it.

        On machines that do not share the folder, each would keep a part of every checkpoint.

        Raises:
            RunFolderError: the ranks see different folders.
        """
        # The name is new in every run, because a network file system may remember that a file was not there.
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
                f"{seen.index(False)} does not see there what rank 0 wrote. Choose a folder on a shared file system"
            )

    def write_config(self, text: str) -> None:
        """Write the resolved configuration. Call it once the settings are known to fit the run in the folder.

        Raises:
            RunFolderError: the folder cannot be written to.
        """
        with explain_write_errors(f"output_dir = {self.path}", "Choose another output_dir"):
            self.config.write_text(text, encoding="utf-8")

    def write_evaluation(self, text: str) -> None:
        """Write evaluation.json.

        Raises:
            RunFolderError: the folder cannot be written to.
        """
        with explain_write_errors(f"output_dir = {self.path}", "Choose another output_dir"):
            self.evaluation.write_text(text, encoding="utf-8")
