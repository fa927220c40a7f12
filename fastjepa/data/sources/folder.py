"""A folder of image files, nested as one likes."""

from __future__ import annotations

import heapq
import os
from collections.abc import Callable, Iterator
from itertools import groupby

import numpy as np

from fastjepa.data.dataset import ImageDataset, Ints, Strings
from fastjepa.data.sources.index import Listing, entries
from fastjepa.errors import DataError

# What is taken for an image, by its name; what it really is, its header says.
IMAGE_EXTENSIONS = frozenset(
    {".avif", ".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)
_EXTENSIONS = frozenset(extension.encode() for extension in IMAGE_EXTENSIONS)


def is_image_name(name: bytes) -> bool:
    return name[name.rfind(b".") :].lower() in _EXTENSIONS


def list_folder(folders: list[str]) -> Listing:
    """The images below a folder (a list of one), at any depth; names that start with a dot are passed over.

    Labels are the names of the first-level folders, if all images lie in such folders and there are at least two.
    Symbolic links to folders are followed after all real folders and only if they lead to a new one, so there are no
    loops, and no image is listed twice.

    Raises:
        DataError: the folder cannot be read or holds no images.
    """
    (folder,) = folders
    walk = _Walk(os.fsencode(folder))
    names = Strings.of(walk.names(b""))
    behind_links = []
    while walk.links:
        walk.links.sort()
        if found := list(walk.names(walk.links.pop(0))):
            behind_links.append(found)
    if behind_links:
        names = Strings.of(heapq.merge(names, *behind_links))
    others = f"{walk.others} other files" + (f", such as {os.fsdecode(walk.other)}" if walk.others else "")
    if not names:
        raise DataError(
            f"no images in {folder} ({others}); looked at any depth for {' '.join(sorted(IMAGE_EXTENSIONS))}, in upper or "
            "lower case, and for shards and tables in the folder itself"
        )
    warnings = (
        [f"{folder}: passed over {others}: no images by their names, or links that lead to none"] if walk.others else []
    )
    labels, class_names = _first_level(names)
    return Listing(ImageDataset(folder, names, labels, class_names), walk.watched, warnings)


class _Walk:
    """One look at every folder below a root."""

    def __init__(self, root: bytes) -> None:
        self._root = root
        self._seen: set[tuple[int, int]] = set()
        self.watched: list[bytes] = []
        self.links: list[bytes] = []
        """Links to folders that were met, with a slash behind."""
        self.others = 0
        """Files that are no images, and one of them."""
        self.other = b""

    def names(self, prefix: bytes) -> Iterator[bytes]:
        """The images below a folder, in sorted order, a folder at a time: nothing that holds all names need be sorted."""
        stack = [prefix]
        while stack:
            name = stack.pop()
            if name and not name.endswith(b"/"):
                yield name
            else:  # a slash behind a folder's name sorts it where the names below it belong
                stack += sorted(self._look(name), reverse=True)

    def _look(self, prefix: bytes) -> Iterator[bytes]:
        path = self._root + b"/" + prefix
        try:
            status = os.stat(path)  # noqa: PTH116 (bytes)
        except OSError as error:
            raise DataError(f"{os.fsdecode(path)}: cannot be read ({error.strerror})") from error
        if (status.st_dev, status.st_ino) in self._seen:
            return
        self._seen.add((status.st_dev, status.st_ino))
        self.watched.append(path)
        for entry in entries(path):
            name = prefix + entry.name
            if entry.is_dir(follow_symlinks=False):
                yield name + b"/"
            elif is_image_name(name) and _leads_to(entry.is_file):
                yield name
            elif _leads_to(entry.is_dir):
                self.links.append(name + b"/")
            else:
                if entry.is_symlink():  # perhaps to what is not mounted yet
                    self.watched.append(path + entry.name)
                self.others += 1
                self.other = self.other or name


def _leads_to(kind: Callable[[], bool]) -> bool:
    try:
        return kind()
    except OSError:  # a link to itself, or into a folder that cannot be read
        return False


def _first_level(names: Strings) -> tuple[Ints | None, tuple[str, ...]]:
    """Labels and class names; none, if an image lies in no folder or all lie in one."""
    folders, counts = [], []
    for first, members in groupby(names, lambda name: name[: max(name.find(b"/"), 0)]):  # equal ones stand side by side
        folders.append(first)
        counts.append(sum(1 for _ in members))
    if len(folders) < 2 or b"" in folders:
        return None, ()
    ordered = sorted(folders)  # as torchvision numbers them: `a` before `a.b`, whose images come first
    number = {folder: label for label, folder in enumerate(ordered)}
    labels = np.repeat(np.array([number[folder] for folder in folders], np.int64), counts)
    return labels, tuple(folder.decode("utf-8", "backslashreplace") for folder in ordered)
