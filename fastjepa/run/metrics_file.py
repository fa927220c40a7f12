"""metrics.jsonl: one JSON object per line, in a file that stays whole through kills and resumes."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastjepa.errors import describe_error
from fastjepa.run.folder import explain_write_errors

logger = logging.getLogger(__name__)


class MetricsFile:
    """metrics.jsonl, opened to append lines, each of which is flushed at once.

    Opening the file removes the lines of steps after `first_step`, which a resumed run is about to write again, and damaged
    lines, each with a warning.

    Args:
        path: the file; it need not exist.
        first_step: number of steps that were done before this process.

    Raises:
        RunFolderError: the file cannot be written (disk full, no permission).
    """

    def __init__(self, path: Path, first_step: int) -> None:
        self._path = path
        temporary = path.with_name(f".{path.name}.tmp")
        with explain_write_errors(str(self._path), "Checkpoints are intact"):
            temporary.write_bytes(b"".join(line + b"\n" for line in _lines_up_to(first_step, path)))
            temporary.replace(path)
            self._file = path.open("a", encoding="utf-8")

    def write(self, values: dict[str, Any]) -> None:
        with explain_write_errors(str(self._path), "Checkpoints are intact"):
            self._file.write(json.dumps(values) + "\n")
            self._file.flush()

    def close(self) -> None:
        self._file.close()


def _lines_up_to(step: int, path: Path) -> Iterator[bytes]:
    """Yield the lines of steps up to `step` that are whole: the run may have been killed in a line, or its disk full."""
    complete = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    for number, line in enumerate(complete, 1):
        try:
            if json.loads(line)["step"] <= step:
                yield line
        except (ValueError, KeyError, TypeError) as error:
            logger.warning("%s: line %d is damaged, and is removed (%s)", path, number, describe_error(error))
