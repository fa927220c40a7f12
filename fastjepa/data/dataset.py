"""The list of images of a data set, in one form for all sources: a name, a label or none, and where the bytes lie.

An image is a file of its own (folders, lists) or a span of a larger file (tar shards, Arrow files). So every source is read
in the same way: open, read at an offset, close. No file stays open, and a process holds nothing but the list. The list of a
large data set is memory-mapped (`sources.index`): 14 million names are 0.6 GB of page cache, which all ranks share.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import os
import stat
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fastjepa.data.image_errors import BadImage, reason_of

Ints = npt.NDArray[np.int64]

# Errors of network file systems, and of processes with many open files, that may pass: the image is not to blame.
_PASSING_ERRORS = (errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ETIMEDOUT)
_ATTEMPTS, _PAUSE = 3, 0.2  # reads of one image; seconds between two of them

# Strings that are Python objects at the same time: millions of them would take gigabytes.
_STRINGS_AT_ONCE = 1 << 16


def printable(path: str | bytes) -> str:
    """A path as text that any terminal, log and file takes: bytes that are not UTF-8 are written as escapes."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


class Strings:
    """An immutable sequence of byte strings without NUL, kept in two arrays that can be memory-mapped."""

    def __init__(self, text: npt.NDArray[np.uint8], ends: Ints) -> None:
        """
        Args:
            text: the strings, with a NUL between each two.
            ends: int64 [n], where each string ends in `text`.
        """
        self.text, self.ends = text, ends

    @staticmethod
    def of(strings: Iterable[bytes]) -> Strings:
        """Copy `strings` into the two arrays.

        Raises:
            ValueError: a string holds a NUL.
        """
        text, ends = bytearray(), [np.empty(0, np.int64)]
        iterator = iter(strings)
        while some := list(islice(iterator, _STRINGS_AT_ONCE)):
            lengths = np.fromiter(map(len, some), np.int64, len(some))
            ends.append(len(text) + np.cumsum(lengths + 1) - 1)
            text += b"\0".join(some)
            text += b"\0"
        joined = np.concatenate(ends)
        if text.count(b"\0") != len(joined):
            raise ValueError("a string holds a NUL")
        del text[-1:]
        return Strings(np.frombuffer(text, np.uint8), joined)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> bytes:
        start = int(self.ends[index - 1]) + 1 if index else 0
        return self.text[start : int(self.ends[index])].tobytes()

    def __iter__(self) -> Iterator[bytes]:
        for first in range(0, len(self), _STRINGS_AT_ONCE):
            last = min(first + _STRINGS_AT_ONCE, len(self)) - 1
            start = int(self.ends[first - 1]) + 1 if first else 0
            yield from self.text[start : int(self.ends[last])].tobytes().split(b"\0")


class Spans(NamedTuple):
    """Where n samples lie in files that hold many of them."""

    files: Strings
    """The files, relative to the data set's root or absolute."""
    file: npt.NDArray[np.int32]
    """[n]: the index into `files`; -1: the sample is a file of its own, at its name."""
    start: Ints
    """[n]: the sample's first byte in its file."""
    size: Ints
    """[n]: the sample's bytes; -1: all bytes of the file, which then holds one image."""


def _read(path: bytes, start: int, size: int, max_bytes: int) -> bytes:
    """Read `size` bytes of a file (-1: all of it) from `start` on.

    The read is unbuffered: one call, as a rule, during which the interpreter's lock is free.
    """
    # O_NONBLOCK: opening a pipe would wait for ever.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise BadImage("not a regular file")
        wanted = status.st_size if size < 0 else size
        if wanted > max_bytes:
            raise BadImage(f"{wanted} bytes, expected at most {max_bytes} (8 for each of data.max_pixels)")
        data = os.pread(descriptor, wanted, start)
        while len(data) < wanted and (more := os.pread(descriptor, wanted - len(data), start + len(data))):
            data += more
    finally:
        os.close(descriptor)
    if len(data) < wanted:
        raise BadImage(f"the file ends after {len(data)} of its {wanted} bytes")
    return data


@dataclass(frozen=True, eq=False)
class ImageDataset:
    """The images of one split of a source. A sample's identity is its index.

    The order is stable: files are sorted by their names, or stand as a pattern or a list has them; the samples within a
    file stand as the file has them.
    """

    root: str
    """The folder that names and files are relative to."""
    names: Strings
    """Unique names: the path of an image file, or file and member or row, as in `shard-000.tar/0001.jpg`."""
    labels: Ints | None
    """int64 [n], indices into `class_names`; None: the source gives no labels."""
    class_names: tuple[str, ...]
    spans: Spans | None = None
    """None: every sample is a file of its own, at its name."""

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        """A sample's name for people: bytes that are not UTF-8 are written as escapes."""
        return printable(self.names[index])

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of the names: a run may only be resumed on the same list of samples."""
        return hashlib.sha256(self.names.text.data).hexdigest()

    def read(self, index: int, max_bytes: int) -> bytes:
        """Read the encoded image.

        Raises:
            BadImage: it cannot be read (missing, unreadable, cut short), is empty, or is larger than `max_bytes`.
        """
        name, start, size = self.names[index], 0, -1
        if self.spans is not None and (file := int(self.spans.file[index])) >= 0:
            name, start, size = self.spans.files[file], int(self.spans.start[index]), int(self.spans.size[index])
        path = os.path.join(os.fsencode(self.root), name)  # noqa: PTH118 (bytes)
        for attempt in range(_ATTEMPTS):
            try:
                data = _read(path, start, size, max_bytes)
                break
            except OSError as error:
                if error.errno not in _PASSING_ERRORS or attempt == _ATTEMPTS - 1:
                    raise BadImage(reason_of(error)) from error
                time.sleep(_PAUSE)
        if not data:
            raise BadImage("empty file")
        return data

    def labels_by(self, class_names: tuple[str, ...]) -> Ints | None:
        """The labels as indices into the class names of another data set. Classes that it lacks are numbered after those
        that it has."""
        if self.labels is None:
            return None
        unknown = [name for name in self.class_names if name not in class_names]
        number = {name: i for i, name in enumerate([*class_names, *unknown])}
        return np.array([number[name] for name in self.class_names], np.int64)[self.labels]
