"""The index of a data set: its list of images, made once and cached with a checksum.

An index is a folder of plain arrays below the cache folder. It is used again while every folder and file that it was made
from has the same modification time and size, and is thrown away otherwise. So a data set of millions of files opens in the
time that it takes to look at its folders.
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
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastjepa.data.dataset import ImageDataset, Spans, Strings, printable
from fastjepa.data.sources.cache import cache_folder, temporary_folder

logger = logging.getLogger(__name__)

_FORMAT = 1
# Seconds. A folder that changed less than this before it was listed may change again without a trace in its time.
_SETTLED_AFTER = 2.0


@dataclass
class Listing:
    """The images that a source found, and what the list of them depends on."""

    dataset: ImageDataset
    watched: list[bytes]
    """The folders and files that the list was made from. If one of them changes, the list is made anew."""
    warnings: list[str] = field(default_factory=list)
    """Messages for the user each time the data set is opened, for example about a broken shard."""
    complete: bool = True
    """False: something could not be read just now, so the list is not cached."""


def indexed(key: str, build: Callable[[], Listing]) -> ImageDataset:
    """The data set that `build` lists; it is taken from the cache if nothing has changed since it was listed.

    A cache that cannot be written is no error: the list is made each time, and a warning says so.

    Args:
        key: everything that the list depends on besides the files' contents, such as the kind of source and its path.
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
            logger.warning(
                "the list of images is not cached in %s (%s): set FASTJEPA_CACHE to a folder that can be written",
                folder,
                error.strerror,
            )
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
    """Write an index into a temporary folder, then rename that, so that no reader sees half an index."""
    with temporary_folder(folder) as temporary:
        header: dict[str, Any] = {
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
        header["arrays"] = {name: _file_checksum(temporary / f"{name}.npy") for name in arrays}
        header["checksum"] = _header_checksum(header)
        with (temporary / "index.json").open("w", encoding="utf-8") as text:
            json.dump(header, text)
            text.flush()
            os.fsync(text.fileno())
        # The previous index is kept: another run may have it mapped. Another rank may win the race for either rename.
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
    """Load the cached listing; None if there is none, it is damaged, or something that it was made from has changed."""
    try:
        header = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        if header["format"] != _FORMAT:
            return None
        if header.pop("checksum") != _header_checksum(header):
            raise ValueError("the checksum of index.json is wrong")
        files = {name: folder / f"{name}.npy" for name in header["arrays"]}
        # Check before mapping: numpy raises errors of many kinds on a damaged header.
        if damaged := [name for name, file in files.items() if _file_checksum(file) != header["arrays"][name]]:
            raise ValueError(f"the checksum of {', '.join(damaged)} is wrong")
        arrays = {name: np.asarray(np.load(file, mmap_mode="r", allow_pickle=False)) for name, file in files.items()}
        root = os.fsdecode(bytes.fromhex(header["root"]))
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
            tuple(header["class_names"]),
            spans,
        )
        return Listing(dataset, paths, list(header["warnings"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s: this cached list cannot be used (%s): the data set is listed anew", folder, error)
        return None


def _state(paths: list[bytes], started: float | None = None) -> np.ndarray[Any, Any]:
    """Modification time in ns and size of each path, int64 [n, 2].

    -1 stands for a path that does not exist. -2 stands for one that had changed just before `started`: it equals no later
    state, so the list is made anew.
    """

    def state_of(path: bytes) -> tuple[int, int]:
        try:
            status = os.stat(path)  # noqa: PTH116 (bytes)
        except OSError:
            return -1, -1
        if started is not None and status.st_mtime > started - _SETTLED_AFTER:
            return -2, -2
        # A folder's size says nothing that its time does not.
        return status.st_mtime_ns, status.st_size if stat.S_ISREG(status.st_mode) else 0

    return np.array([state_of(path) for path in paths], np.int64).reshape(-1, 2)


def _file_checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _header_checksum(header: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()
