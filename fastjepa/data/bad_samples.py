"""The bad samples of a run: each named once, in `bad_samples.jsonl`, by whichever rank meets it first."""

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
    """Counts and names bad samples, for all ranks of a run together and across its resumes.

    The file is the only thing that the ranks share: each appends under a lock, after it has read what others added. Without
    a file, or where it cannot be written, this process counts for itself.
    """

    def __init__(self, dataset: ImageDataset, max_share: float, path: Path | None) -> None:
        """
        Args:
            dataset: what the samples belong to.
            max_share: of the data set's samples; with more bad ones, and more than one, `add` raises. With 0 at the first.
            path: bad_samples.jsonl of the run folder, or None.
        """
        self._dataset, self._max_share, self._path = dataset, max_share, path
        self._lock = threading.Lock()
        self._reasons: dict[int, str] = {}  # of those that this process has met
        self._names: dict[str, None] = {}  # of all, in order
        self._read_up_to = 0

    def __len__(self) -> int:
        """Distinct bad samples so far, of all ranks."""
        with self._lock:
            self._share(None)
            return len(self._names)

    def reason(self, index: int) -> str | None:
        """Why a sample is bad, if this process has met it already."""
        return self._reasons.get(index)

    def add(self, index: int, reason: str) -> None:
        """A sample turned out bad, for the first time or again.

        Raises:
            DataError: they are too many now; the message names some of them and where all are.
        """
        with self._lock:
            if index not in self._reasons:
                self._reasons[index] = reason
                name = self._dataset.name(index)
                self._share({"index": index, "name": name, "reason": reason})
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

    def _share(self, entry: dict[str, object] | None) -> None:
        """Read what other ranks named, and name `entry` unless one of them has."""
        mine = str(entry["name"]) if entry else None
        try:
            if self._path is not None and (entry is not None or self._path.exists()):
                with self._path.open("a+b") as file:
                    with contextlib.suppress(OSError):  # some file systems have no locks
                        fcntl.lockf(file, fcntl.LOCK_EX)  # released when the file is closed
                    file.seek(self._read_up_to)
                    news, newline, rest = file.read().rpartition(b"\n")
                    self._names |= dict.fromkeys(self._of_this_dataset(news))
                    self._read_up_to += len(news) + len(newline)
                    if entry is not None and mine not in self._names:
                        line = json.dumps(entry).encode() + b"\n"
                        # A rank that was killed may have left half a line.
                        file.write(b"\n" + line if rest else line)
        except OSError as error:
            logger.warning(
                "%s cannot be written (%s): bad images are named in this log only", self._path, error.strerror
            )
            self._path = None
        if mine is not None:
            self._names[mine] = None

    def _of_this_dataset(self, lines: bytes) -> Iterator[str]:
        """The names in lines of JSON. Half a line, of a process that was killed, is passed over, and so are samples of
        another source that the run had before."""
        for line in lines.splitlines():
            try:
                entry = json.loads(line)
                index, name = int(entry["index"]), str(entry["name"])
            except (ValueError, KeyError, TypeError):
                continue
            if 0 <= index < len(self._dataset) and self._dataset.name(index) == name:
                yield name
