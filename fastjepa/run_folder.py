"""The folder of a run: its resolved configuration, metrics and checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastjepa import distributed
from fastjepa.errors import RunFolderError


@contextmanager
def writing(what: str, advice: str) -> Iterator[None]:
    """Turns a failed write into a RunFolderError that says what could not be written, why, and what to do."""
    try:
        yield
    except OSError as error:
        raise RunFolderError(f"{what}: cannot be written ({error.strerror}). {advice}") from error


class RunFolder:
    """config.yaml, metrics.jsonl, bad_samples.jsonl, evaluation.json and checkpoints/ below one path."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.bad_samples = self.path / "bad_samples.jsonl"
        self.evaluation = self.path / "evaluation.json"
        self.checkpoints = self.path / "checkpoints"

    def create(self) -> None:
        """Make the folder.

        Raises:
            RunFolderError: it cannot be made.
        """
        with writing(f"output_dir = {self.path}", "Choose another output_dir"):
            self.checkpoints.mkdir(parents=True, exist_ok=True)

    def check_shared(self) -> None:
        """All ranks call it: on machines that do not share the folder, each would keep a part of every checkpoint.

        Raises:
            RunFolderError: the ranks see different folders.
        """
        here = self.checkpoints.stat().st_ino if self.checkpoints.is_dir() else None
        if len(set(distributed.gather_objects(here))) > 1:
            raise RunFolderError(f"output_dir = {self.path}: expected one folder that all machines of the run share")

    def write_config(self, text: str) -> None:
        """Write the resolved configuration, once it is known to fit the run that the folder holds.

        Raises:
            RunFolderError: the folder cannot be written to.
        """
        with writing(f"output_dir = {self.path}", "Choose another output_dir"):
            self.config.write_text(text, encoding="utf-8")

    def write_evaluation(self, text: str) -> None:
        """Write the figures of the evaluation.

        Raises:
            RunFolderError: the folder cannot be written to.
        """
        with writing(f"output_dir = {self.path}", "Choose another output_dir"):
            self.evaluation.write_text(text, encoding="utf-8")
