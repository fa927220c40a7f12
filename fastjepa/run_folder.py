"""The folder of a run: its resolved configuration, metrics and checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastjepa import distributed
from fastjepa.errors import RunFolderError


class RunFolder:
    """config.yaml, metrics.jsonl, evaluation.json and checkpoints/ below one path."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.evaluation = self.path / "evaluation.json"
        self.checkpoints = self.path / "checkpoints"

    def create(self) -> None:
        """Make the folder.

        Raises:
            RunFolderError: it cannot be made.
        """
        with self._writing():
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
        with self._writing():
            self.config.write_text(text, encoding="utf-8")

    def write_evaluation(self, text: str) -> None:
        """Write the figures of the evaluation.

        Raises:
            RunFolderError: the folder cannot be written to.
        """
        with self._writing():
            self.evaluation.write_text(text, encoding="utf-8")

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunFolderError(
                f"output_dir = {self.path}: cannot write there ({error.strerror}: {error.filename}); "
                "choose another output_dir"
            ) from error
