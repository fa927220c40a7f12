"""The cache folder: where lists of images and unpacked data sets are kept."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path


def cache_folder() -> Path:
    """The cache folder: $FASTJEPA_CACHE, else $XDG_CACHE_HOME/fastjepa, else ~/.cache/fastjepa."""
    if given := os.environ.get("FASTJEPA_CACHE"):
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "fastjepa"


@contextlib.contextmanager
def temporary_folder(final: Path) -> Iterator[Path]:
    """Make a new hidden folder beside `final`, to be filled and renamed to it. Unless renamed, it is removed afterwards.

    Users other than its owner may read it, unlike the folders of tempfile: a cache may be shared.
    """
    folder = final.with_name(f".{final.name}-{uuid.uuid4().hex}")
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
