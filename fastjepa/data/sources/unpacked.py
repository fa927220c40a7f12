"""Images that are compressed in their file: unpacked once below the cache folder, where they can be read by offset."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from fastjepa.data.dataset import Ints
from fastjepa.data.sources.cache import cache_folder, temporary_folder
from fastjepa.errors import DataError

logger = logging.getLogger(__name__)

_RESERVE = 64 << 20  # bytes that are left free on the disk
_TIME_TOLERANCE = 2_000_000_000  # ns: file systems round times


class UnpackedImages:
    """The place in the cache for the images of one file, as that file is now: path, size and modification time name it.

    It is a folder of two files, which is there whole or not at all: `images.bin`, one image behind the other, and
    `spans.npy`, int64 [n, 2], start and size of each image; size -1 stands for a row without bytes.
    """

    def __init__(self, path: str, column: str) -> None:
        """
        Raises:
            OSError: the file cannot be read.
        """
        self._path, self._status = path, os.stat(path)  # noqa: PTH116
        key = f"{path}\0{self._status.st_size}\0{self._status.st_mtime_ns}\0{column}"
        name = hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()[:24]
        self._folder = cache_folder() / "tables" / name
        self.images = self._folder / "images.bin"

    def spans(self) -> Ints | None:
        """Start and size of each image, int64 [n, 2]; None if nothing is unpacked, or it has changed since."""
        try:
            spans = np.load(self._folder / "spans.npy", allow_pickle=False)
            status = self.images.stat()
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            logger.warning(
                "%s: cannot be used (%s): the images of %s are unpacked anew", self._folder, error, self._path
            )
            return None
        unchanged = abs(status.st_mtime_ns - self._status.st_mtime_ns) < _TIME_TOLERANCE
        whole = spans.shape[1:] == (2,) and status.st_size >= int(spans.sum(1).max(initial=0))
        return spans if unchanged and whole else None

    def write(self, batches: Callable[[], Iterable[tuple[memoryview, Ints]]]) -> Ints:
        """Unpack the images, unless another process does so meanwhile.

        Args:
            batches: gives the bytes of some images, one behind the other, and their spans in these, int64 [k, 2]. If it
                raises, nothing is left behind.

        Returns:
            The same as `spans`.

        Raises:
            DataError: the cache cannot be written.
        """
        parent = self._folder.parent
        with _cache_errors(parent):
            parent.mkdir(parents=True, exist_ok=True)
            with _locked(self._folder.with_suffix(".lock")) as locked:
                if (spans := self.spans()) is not None:
                    return spans
                for left_behind in parent.glob(f".{self._folder.name}-*") if locked else ():  # a process was killed
                    shutil.rmtree(left_behind, ignore_errors=True)
                with temporary_folder(self._folder) as temporary:
                    spans = _write_files(temporary, batches)
                    # Give it the time of the file that it was made from. An index then trusts it at once (it would not trust
                    # a young file, which may still grow), and sees when the source changes.
                    os.utime(temporary / self.images.name, ns=(self._status.st_atime_ns, self._status.st_mtime_ns))
                    if self.spans() is None:
                        shutil.rmtree(self._folder, ignore_errors=True)  # the folder that is there is damaged
                        temporary.rename(self._folder)
        logger.info("%s: %.2f GB of images unpacked into %s", self._path, spans[:, 1].clip(0).sum() / 1e9, self._folder)
        return spans


def require_space(needed: int, what: str) -> None:
    """Check that the cache folder's disk has room for `needed` bytes, before hours of unpacking.

    Raises:
        DataError: there is too little room, or the folder cannot be made.
    """
    folder = cache_folder()
    with _cache_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    needed += _RESERVE
    if needed > free:
        raise DataError(
            f"the images of {what} are compressed and have to be unpacked once, which takes {needed / 1e9:.2f} GB in "
            f"{folder}; {free / 1e9:.2f} GB are free there: make room, or set FASTJEPA_CACHE to a folder on a larger disk"
        )


def _write_files(folder: Path, batches: Callable[[], Iterable[tuple[memoryview, Ints]]]) -> Ints:
    end, all_spans = 0, [np.empty((0, 2), np.int64)]
    with (folder / "images.bin").open("wb") as file:
        for images, spans in batches():
            file.write(images)
            all_spans.append(spans + np.array([end, 0]))
            end += len(images)
        file.flush()
        os.fsync(file.fileno())
    result = np.concatenate(all_spans)
    with (folder / "spans.npy").open("wb") as file:
        np.save(file, result, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
    return result


@contextlib.contextmanager
def _cache_errors(folder: Path) -> Iterator[None]:
    """Turn an OSError into a DataError that says what to set."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"images cannot be unpacked into {folder} ({error.strerror}): set FASTJEPA_CACHE to a folder that can be written"
        ) from error


@contextlib.contextmanager
def _locked(lock: Path) -> Iterator[bool]:
    """Hold a lock; wait while another process holds it. Gives False where the file system has no locks."""
    with lock.open("wb") as file:
        locked = True
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            logger.info("%s: waiting for another process that unpacks the same file", lock)
            try:
                fcntl.lockf(file, fcntl.LOCK_EX)
            except OSError:
                locked = False
        yield locked  # the lock is released when the file is closed
