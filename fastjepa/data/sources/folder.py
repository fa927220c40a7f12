"""A folder of image files, nested to any depth."""

from __future__ import annotations

import heapq
import os
from collections.abc import Callable, Iterator
from itertools import groupby

import numpy as np

from fastjepa.data.dataset import ImageDataset, Ints, Strings
from fastjepa.data.sources.index import Listing
from fastjepa.errors import DataError

# A file with such a name is taken for an image. Its header tells later what it really is.
IMAGE_EXTENSIONS = frozenset(
    {".avif", ".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)
_EXTENSIONS = frozenset(extension.encode() for extension in IMAGE_EXTENSIONS)


def is_image_name(name: bytes) -> bool:
    """True if the name ends like that of an image, in upper or lower case."""
    return name[name.rfind(b".") :].lower() in _EXTENSIONS


def entries(folder: bytes) -> Iterator[os.DirEntry[bytes]]:
    """The visible entries of a folder, in no order.

    Raises:
        DataError: the folder cannot be read.
    """
    try:
        with os.scandir(folder) as found:
            yield from (entry for entry in found if not entry.name.startswith(b"."))
    except OSError as error:
        raise DataError(
            f"{os.fsdecode(folder)}: cannot be read ({error.strerror}); expected a readable folder of images"
        ) from error


def list_folder(folders: list[str]) -> Listing:
    """The images below a folder, at any depth. Names that start with a dot are passed over.

    The labels are the names of the first-level folders, if all images lie in such folders and there are at least two.
    Symbolic links to folders are followed after all real folders, and only if they lead to a new one: so there are no loops,
    and no image is listed twice.

    Args:
        folders: the folder, alone: every source is listed from a sequence of files.

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
        [f"{folder}: passed over {others}: not named like images, or links that lead to none"] if walk.others else []
    )
    labels, class_names = _first_level(names)
    return Listing(ImageDataset(folder, names, labels, class_names), walk.watched, warnings)


class _Walk:
    """A walk through the folders below a root. It looks at each folder once."""

    def __init__(self, root: bytes) -> None:
        self._root = root
        self._seen: set[tuple[int, int]] = set()
        self.watched: list[bytes] = []
        self.links: list[bytes] = []
        """Links to folders that were met and not followed yet, with a slash behind."""
        self.others = 0
        """The number of files that are no images."""
        self.other = b""
        """One of them."""

    def names(self, prefix: bytes) -> Iterator[bytes]:
        """The images below a folder, in sorted order. Each folder is sorted by itself, so no list holds all names."""
        stack = [prefix]
        while stack:
            name = stack.pop()
            if name and not name.endswith(b"/"):
                yield name
            else:  # the slash behind a folder's name sorts it where the names below it belong
                stack += sorted(self._look(name), reverse=True)

    def _look(self, prefix: bytes) -> Iterator[bytes]:
        """The images and folders in one folder, folders with a slash behind; none if it has been looked at before."""
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
                if entry.is_symlink():  # its target may not be mounted yet
                    self.watched.append(path + entry.name)
                self.others += 1
                self.other = self.other or name


def _leads_to(is_kind: Callable[[], bool]) -> bool:
    """The answer of a DirEntry's is_file or is_dir; False for a link that leads nowhere."""
    try:
        return is_kind()
    except OSError:  # a link to itself, or into a folder that cannot be read
        return False


def _first_level(names: Strings) -> tuple[Ints | None, tuple[str, ...]]:
    """Labels and class names from the first-level folders; none if an image lies in no folder or all lie in one."""
    folders, counts = [], []
    for first, members in groupby(names, lambda name: name[: max(name.find(b"/"), 0)]):  # equal ones stand side by side
        folders.append(first)
        counts.append(sum(1 for _ in members))
    if len(folders) < 2 or b"" in folders:
        return None, ()
    ordered = sorted(folders)  # torchvision numbers `a` before `a.b`, though the images of `a.b` come first
    number = {folder: label for label, folder in enumerate(ordered)}
    labels = np.repeat(np.array([number[folder] for folder in folders], np.int64), counts)
    return labels, tuple(folder.decode("utf-8", "backslashreplace") for folder in ordered)
