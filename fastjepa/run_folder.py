"""The folder of a run: its resolved configuration, metrics and checkpoints."""

from __future__ import annotations

from pathlib import Path

from fastjepa.errors import RunFolderError


class RunFolder:
    """config.yaml, metrics.jsonl, evaluation.json and checkpoints/ below one path."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.evaluation = self.path / "evaluation.json"
        self.checkpoints = self.path / "checkpoints"

    def create(self, config_text: str) -> None:
        """Make the folder and write the resolved configuration into it.

        Raises:
            RunFolderError: the folder cannot be made or written to.
        """
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self.config.write_text(config_text, encoding="utf-8")
        except OSError as error:
            raise RunFolderError(
                f"output_dir = {self.path}: cannot write there ({error.strerror}: {error.filename}); choose another output_dir"
            ) from error
