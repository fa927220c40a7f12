"""Data sets are listed once and the list is cached, with a checksum and with what it was made from.

An index is a folder of plain arrays below the cache folder. It is used again while every folder and file that it was
made from is as it was (modification time and size), and thrown away otherwise; so a data set of millions of files opens
in the time that it takes to look at its folders.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastjepa.data.dataset import ImageDataset, Spans, Strings, printable
from fastjepa.errors import DataError

logger = logging.getLogger(__name__)

_FORMAT = 1
_SETTLED_AFTER = 2.0  # seconds; a folder changed later than this before it was listed may change again unnoticed


@dataclass
class Listing:
    """What a source found."""

    dataset: ImageDataset
    watched: list[bytes]
    """Folders and files that the list was made from: if one of them changes, the list is made anew."""
    warnings: list[str] = field(default_factory=list)
    """What the user should know each time the data set is opened, such as a broken shard."""
    complete: bool = True
    """False: something could not be read just now, so the list is not cached."""


def cache_folder() -> Path:
    """Where indices and unpacked data sets lie: $FASTJEPA_CACHE, else $XDG_CACHE_HOME/fastjepa, else ~/.cache/fastjepa."""
    if given := os.environ.get("FASTJEPA_CACHE"):
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "fastjepa"


def indexed(key: str, build: Callable[[], Listing]) -> ImageDataset:
    """The data set that `build` lists, from the cache if nothing has changed since.

    A cache that cannot be written is no error: the list is made each time, which is logged.

    Args:
        key: all that the list depends on besides the files' contents, such as the kind of source and its path.
        build: lists the source; may raise DataError.
    """
    folder = cache_folder() / "index" / hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()[:24]
    listing = _load(folder)
    if listing is None:
        started = time.time()
        listing = build()
        root, took = printable(listing.dataset.root), time.time() - started
        logger.info("%s: %d images listed in %.1f s", root, len(listing.dataset), took)
        try:
            if listing.complete:
                _save(folder, listing, started)
        except OSError as error:
            logger.warning("the list of images is not cached in %s (%s): set FASTJEPA_CACHE", folder, error.strerror)
    for warning in listing.warnings:
        logger.warning("%s", warning)
    return listing.dataset


def _arrays(listing: Listing) -> dict[str, np.ndarray[Any, Any]]:
    dataset = listing.dataset
    watched = Strings.of(listing.watched)
    arrays: dict[str, np.ndarray[Any, Any]] = {"names": dataset.names.text, "name_ends": dataset.names.ends}
    arrays |= {"watched": watched.text, "watched_ends": watched.ends}
    if dataset.labels is not None:
        arrays["labels"] = dataset.labels
    if dataset.spans is not None:
        files, file, start, size = dataset.spans
        arrays |= {"files": files.text, "file_ends": files.ends, "file": file, "start": start, "size": size}
    return arrays


def _save(folder: Path, listing: Listing, started: float) -> None:
    """Atomically: into a folder beside, which then takes the name."""
    with temporary_folder(folder) as temporary:
        described: dict[str, Any] = {
            "format": _FORMAT,
            "root": os.fsencode(listing.dataset.root).hex(),
            "class_names": listing.dataset.class_names,
            "warnings": listing.warnings,
        }
        arrays = _arrays(listing) | {"watched_state": _state(listing.watched, started)}
        for name, array in arrays.items():
            with (temporary / f"{name}.npy").open("wb") as file:
                np.save(file, array, allow_pickle=False)
                file.flush()
                os.fsync(file.fileno())
        described["arrays"] = {name: _checksum(temporary / f"{name}.npy") for name in arrays}
        described["checksum"] = _checksum_of(described)
        with (temporary / "index.json").open("w", encoding="utf-8") as text:
            json.dump(described, text)
            text.flush()
            os.fsync(text.fileno())
        # The one before is kept: another run may have it mapped. Any of these renames may lose against another rank.
        previous = folder.with_name(f"{folder.name}.previous")
        shutil.rmtree(previous, ignore_errors=True)
        with contextlib.suppress(OSError):
            folder.rename(previous)
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise


def _load(folder: Path) -> Listing | None:
    """The cached listing, if it is whole and nothing that it was made from has changed."""
    try:
        described = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        if described["format"] != _FORMAT:
            return None
        if described.pop("checksum") != _checksum_of(described):
            raise ValueError("the checksum of index.json is wrong")
        files = {name: folder / f"{name}.npy" for name in described["arrays"]}
        # Before they are mapped: numpy trips over damaged headers in ways of its own.
        if damaged := [name for name, file in files.items() if _checksum(file) != described["arrays"][name]]:
            raise ValueError(f"the checksum of {', '.join(damaged)} is wrong")
        arrays = {name: np.asarray(np.load(file, mmap_mode="r", allow_pickle=False)) for name, file in files.items()}
        root = os.fsdecode(bytes.fromhex(described["root"]))
        watched = Strings(arrays["watched"], arrays["watched_ends"])
        paths = [watched[i] for i in range(len(watched))]
        if not np.array_equal(_state(paths), arrays["watched_state"]):
            return None
        spans = None
        if "files" in arrays:
            in_files = Strings(arrays["files"], arrays["file_ends"])
            spans = Spans(in_files, arrays["file"], arrays["start"], arrays["size"])
        dataset = ImageDataset(
            root,
            Strings(arrays["names"], arrays["name_ends"]),
            arrays.get("labels"),
            tuple(described["class_names"]),
            spans,
        )
        return Listing(dataset, paths, list(described["warnings"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s: cannot be used (%s): the data set is listed anew", folder, error)
        return None


def _state(paths: list[bytes], started: float | None = None) -> np.ndarray[Any, Any]:
    """Modification time in ns and size of each path, int64 [n, 2]; -1 for one that is not there, and -2 for one that had
    changed just before `started`, so that it equals no later state."""

    def of(path: bytes) -> tuple[int, int]:
        try:
            status = os.stat(path)  # noqa: PTH116 (bytes)
        except OSError:
            return -1, -1
        if started is not None and status.st_mtime > started - _SETTLED_AFTER:
            return -2, -2
        # A folder's size says nothing that its time does not.
        return status.st_mtime_ns, status.st_size if stat.S_ISREG(status.st_mode) else 0

    return np.array([of(path) for path in paths], np.int64).reshape(-1, 2)


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checksum_of(described: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


# Shared by the sources


@contextlib.contextmanager
def temporary_folder(beside: Path) -> Iterator[Path]:
    """A new hidden folder beside one that is to be, gone afterwards unless it was renamed. Unlike those of tempfile it may
    be read by others than its owner: a cache may be shared."""
    folder = beside.with_name(f".{beside.name}-{uuid.uuid4().hex}")
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def entries(folder: bytes) -> Iterator[os.DirEntry[bytes]]:
    """What is visible in a folder, in no order.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with os.scandir(folder) as found:
            yield from (entry for entry in found if not entry.name.startswith(b"."))
    except OSError as error:
        raise DataError(
            f"{os.fsdecode(folder)}: cannot be read ({error.strerror}); expected a readable folder of images"
        ) from error
