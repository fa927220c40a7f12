"""The bad samples of a run: each is named once in `bad_samples.jsonl`, by the rank that meets it first."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import threading
from collections.abc import Iterator
from pathlib import Path

from fastjepa.data.dataset import ImageDataset
from fastjepa.errors import DataError

logger = logging.getLogger(__name__)

_NAMED_IN_ERROR = 5


class BadSamples:
    """Counts and names the bad samples of a run, over all its ranks and resumes.

    The file is the only thing that the ranks share. Each rank appends to it under a lock, after it has read what the others
    added. Without a file, or where it cannot be written, a process counts only what it meets itself.
    """

    def __init__(self, dataset: ImageDataset, max_share: float, path: Path | None) -> None:
        """
        Args:
            dataset: the data set that the samples belong to.
            max_share: how large a share of the data set may be bad. `add` raises when more than this share and more than
                one sample is bad. With 0 it raises at the first.
            path: bad_samples.jsonl of the run folder, or None.
        """
        self._dataset, self._max_share, self._path = dataset, max_share, path
        self._lock = threading.Lock()
        self._reasons: dict[int, str] = {}  # only of the samples that this process has met
        self._names: dict[str, None] = {}  # of all ranks, in the order in which they were met
        self._read_up_to = 0  # byte of the file

    def __len__(self) -> int:
        """The number of distinct bad samples so far, over all ranks."""
        with self._lock:
            self._exchange(None)
            return len(self._names)

    def reason(self, index: int) -> str | None:
        """Why a sample is bad, if this process has met it already."""
        return self._reasons.get(index)

    def add(self, index: int, reason: str) -> None:
        """Count a sample that turned out bad, for the first time or again.

        Raises:
            DataError: too many are bad now; the message names some of them, and where all are named.
        """
        with self._lock:
            if index not in self._reasons:
                self._reasons[index] = reason
                name = self._dataset.name(index)
                self._exchange({"index": index, "name": name, "reason": reason})
                logger.warning("bad image, another one takes its place: %s: %s", name, reason)
            count, total = len(self._names), len(self._dataset)
            if count == total or count > max(self._max_share * total, self._max_share > 0):
                latest = ", ".join(list(self._names)[-_NAMED_IN_ERROR:])
                where = f"{self._path} names them all" if self._path else "the log names them all"
                raise DataError(
                    f"{self._dataset.root}: {count} of {total} images are bad, more than data.max_bad_share = "
                    f"{self._max_share:g}; the latest are {latest}; {where}. Repair or remove them (and that file), or "
                    "raise the share"
                )

    def _exchange(self, entry: dict[str, object] | None) -> None:
        """Read what other ranks have written, and write `entry` unless one of them has named that sample."""
        name = str(entry["name"]) if entry else None
        try:
            if self._path is not None and (entry is not None or self._path.exists()):
                with self._path.open("a+b") as file:
                    with contextlib.suppress(OSError):  # some file systems have no locks
                        fcntl.lockf(file, fcntl.LOCK_EX)  # released when the file is closed
                    file.seek(self._read_up_to)
                    whole_lines, newline, rest = file.read().rpartition(b"\n")
                    self._names |= dict.fromkeys(self._names_in(whole_lines))
                    self._read_up_to += len(whole_lines) + len(newline)
                    if entry is not None and name not in self._names:
                        line = json.dumps(entry).encode() + b"\n"
                        # A rank that was killed may have left half a line.
                        file.write(b"\n" + line if rest else line)
        except OSError as error:
            logger.warning(
                "%s cannot be written (%s): bad images are named in this log only", self._path, error.strerror
            )
            self._path = None
        if name is not None:
            self._names[name] = None

    def _names_in(self, lines: bytes) -> Iterator[str]:
        """The names in lines of JSON. Two kinds of lines are passed over: half a line, which a killed process left, and
        samples of another source that the run had before."""
        for line in lines.splitlines():
            try:
                entry = json.loads(line)
                index, name = int(entry["index"]), str(entry["name"])
            except (ValueError, KeyError, TypeError):
                continue
            if 0 <= index < len(self._dataset) and self._dataset.name(index) == name:
                yield name
