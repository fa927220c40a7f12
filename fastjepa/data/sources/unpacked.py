"""Images that lie compressed in their file, unpacked once below the cache folder, where they can be read by offset."""

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
from fastjepa.data.sources.index import cache_folder, temporary_folder
from fastjepa.errors import DataError

logger = logging.getLogger(__name__)

_RESERVE = 64 << 20  # bytes that are left free on the disk
_TIMES_DIFFER = 2_000_000_000  # ns; file systems round


class Unpacked:
    """A place for the images of one file, as it is now: the file's path, size and time of change give it its name.

    A folder of two files, which is there whole or not at all: `images.bin`, one image behind the other, and `spans.npy`,
    int64 [n, 2], start and size of each; size -1: a row without bytes.
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
        """int64 [n, 2]; None if it has not been unpacked, or is not as it was left."""
        try:
            spans = np.load(self._folder / "spans.npy", allow_pickle=False)
            status = self.images.stat()
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            logger.warning("%s: cannot be used (%s): %s is unpacked anew", self._folder, error, self._path)
            return None
        as_left = abs(status.st_mtime_ns - self._status.st_mtime_ns) < _TIMES_DIFFER
        return (
            spans
            if as_left and spans.shape[1:] == (2,) and status.st_size >= int(spans.sum(1).max(initial=0))
            else None
        )

    def write(self, batches: Callable[[], Iterable[tuple[memoryview, Ints]]]) -> Ints:
        """Unpack, unless another process has done so meanwhile.

        Args:
            batches: gives some images' bytes, one behind the other, and their spans in these, int64 [k, 2]. It may raise:
                nothing is left behind.

        Raises:
            DataError: the cache cannot be written.
        """
        parent = self._folder.parent
        with _writing(parent):
            parent.mkdir(parents=True, exist_ok=True)
            with _alone(self._folder.with_suffix(".lock")) as alone:
                if (spans := self.spans()) is not None:
                    return spans
                for left_behind in parent.glob(f".{self._folder.name}-*") if alone else ():  # by one that was killed
                    shutil.rmtree(left_behind, ignore_errors=True)
                with temporary_folder(self._folder) as temporary:
                    spans = _write(temporary, batches)
                    # As old as what it was made of: so an index counts it as settled (`index._state`), and changes show.
                    os.utime(temporary / self.images.name, ns=(self._status.st_atime_ns, self._status.st_mtime_ns))
                    if self.spans() is None:
                        shutil.rmtree(self._folder, ignore_errors=True)  # it is damaged
                        temporary.rename(self._folder)
        logger.info("%s: %.2f GB of images unpacked into %s", self._path, spans[:, 1].clip(0).sum() / 1e9, self._folder)
        return spans


def require_space(needed: int, what: str) -> None:
    """
    Raises:
        DataError: the cache folder's disk has less than `needed` bytes left, or the folder cannot be made.
    """
    folder = cache_folder()
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    needed += _RESERVE
    if needed > free:
        raise DataError(
            f"the images of {what} are compressed and have to be unpacked once, which takes {needed / 1e9:.2f} GB in "
            f"{folder}; {free / 1e9:.2f} GB are free there: make room, or set FASTJEPA_CACHE to a folder on a larger disk"
        )


def _write(folder: Path, batches: Callable[[], Iterable[tuple[memoryview, Ints]]]) -> Ints:
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
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"images cannot be unpacked into {folder} ({error.strerror}): set FASTJEPA_CACHE to a folder that can be written"
        ) from error


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[bool]:
    """Wait while another process holds the lock; False where the file system has no locks."""
    with lock.open("wb") as file:
        alone = True
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            logger.info("%s: waiting for another process that unpacks the same file", lock)
            try:
                fcntl.lockf(file, fcntl.LOCK_EX)
            except OSError:
                alone = False
        yield alone  # the lock goes when the file is closed
