"""Data sets: a list of image files, with labels where the folders give them."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from fastjepa.errors import DataError

logger = logging.getLogger(__name__)

# What both decoders read. (DALI reads neither GIF nor AVIF.)
IMAGE_EXTENSIONS = frozenset(
    {".bmp", ".jp2", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)


@dataclass(frozen=True, eq=False)
class ImageDataset:
    """The images of one split. A sample's identity is its index in `paths`."""

    root: str
    paths: tuple[str, ...]
    """Relative to root, with forward slashes, sorted; file names that are not UTF-8 carry surrogates (os.fsdecode)."""
    labels: npt.NDArray[np.int64] | None
    """int64 [n], indices into class_names; None: the folders give no labels."""
    class_names: tuple[str, ...]
    """Sorted; the same in all splits of a source."""

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, index: int) -> str:
        """Where sample `index` lies."""
        return f"{self.root}/{self.paths[index]}"

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of the relative paths: a run may only be resumed on the same list of files."""
        return hashlib.sha256(b"\0".join(os.fsencode(path) for path in self.paths)).hexdigest()


def open_dataset(source: str, split: Literal["train", "val"]) -> ImageDataset | None:
    """The images of one split of a source.

    A folder that has a sub-folder `train` is split: `train` and, if there is one, `val`. Any other folder is all `train`.
    Images lie at any depth; names that start with a dot are passed over. Labels are the names of the first-level folders
    under the split, if all its images lie in such folders and there are at least two.

    Args:
        source: a folder, or `fashion_mnist` for the set inside the package (a folder of that name is `./fashion_mnist`).
        split: which part.

    Returns:
        The data set, or None if the source has no such split.

    Raises:
        DataError: the folder is missing, unreadable or holds no images.
    """
    if source == "fashion_mnist":
        from fastjepa.data.embedded import fashion_mnist  # here, not above: embedded imports this module

        root = fashion_mnist()
    else:
        root = Path(source).expanduser()
    try:
        problem = None if stat.S_ISDIR(root.stat().st_mode) else "Not a folder"
    except OSError as error:
        problem = error.strerror
    if problem:
        raise DataError(f"data.source = {source}: {problem}; expected a folder of images, or fashion_mnist")
    folders = [root / "train", root / "val"] if (root / "train").is_dir() else [root]
    folders = [folder for folder in folders if folder.is_dir()]
    if split == "val" and len(folders) == 1:
        return None
    folder = folders[split == "val"]
    paths, others = _scan(folder)
    if not paths:
        raise DataError(
            f"data.source = {source}: no images in {folder} ({others} other files); "
            f"looked at any depth for {' '.join(sorted(IMAGE_EXTENSIONS))}, in upper or lower case"
        )
    if others:
        logger.info("%s: %d images; %d other files are passed over", folder, len(paths), others)
    # Both splits' folders, so that a class has the same label in both even if one of them lacks it.
    class_names = sorted({entry.name for f in folders for entry in _entries(f) if entry.is_dir()})
    if len(class_names) < 2 or not all("/" in path for path in paths):
        return ImageDataset(str(folder), paths, None, ())
    label_of = {name: label for label, name in enumerate(class_names)}
    labels = np.array([label_of[path.partition("/")[0]] for path in paths], dtype=np.int64)
    return ImageDataset(str(folder), paths, labels, tuple(class_names))


def _entries(folder: str | Path) -> list[os.DirEntry[str]]:
    """What is visible in a folder, sorted by name."""
    try:
        with os.scandir(folder) as entries:
            return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error.strerror}); expected a readable folder of images") from error


def _scan(root: Path) -> tuple[tuple[str, ...], int]:
    """The images under root (relative, sorted), and the number of other files.

    Symbolic links to folders are followed after all real folders and only if they lead to a new one, so there are no
    loops, and no image is listed twice.
    """
    seen: set[tuple[int, int]] = set()
    links: list[tuple[Path, str]] = []
    paths: list[str] = []
    others = 0

    def walk(folder: Path, prefix: str) -> Iterator[str]:
        nonlocal others
        status = folder.stat()
        if (status.st_dev, status.st_ino) in seen:
            return
        seen.add((status.st_dev, status.st_ino))
        for entry in _entries(folder):
            name = prefix + entry.name
            if entry.is_dir(follow_symlinks=False):
                yield from walk(folder / entry.name, name + "/")
            elif entry.is_dir():
                links.append((folder / entry.name, name + "/"))
            elif Path(entry.name).suffix.lower() in IMAGE_EXTENSIONS and entry.is_file():
                yield name
            else:
                others += 1

    paths.extend(walk(root, ""))
    for folder, prefix in links:  # grows while links lead to links
        paths.extend(walk(folder, prefix))
    return tuple(sorted(paths)), others
