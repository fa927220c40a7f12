"""A folder of image files, nested as one likes."""

from __future__ import annotations

import os

import numpy as np

from fastjepa.data.dataset import ImageDataset, Strings
from fastjepa.data.index import Listing, entries
from fastjepa.errors import DataError

# What is taken for an image, by its name; what it really is, its header says.
IMAGE_EXTENSIONS = frozenset(
    {".avif", ".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)


def is_image_name(name: bytes) -> bool:
    return name[name.rfind(b".") :].lower().decode("latin-1") in IMAGE_EXTENSIONS


def list_folder(folders: list[str]) -> Listing:
    """The images below a folder (a list of one), at any depth; names that start with a dot are passed over.

    Labels are the names of the first-level folders, if all images lie in such folders and there are at least two.
    Symbolic links to folders are followed after all real folders and only if they lead to a new one, so there are no
    loops, and no image is listed twice.

    Raises:
        DataError: the folder cannot be read or holds no images.
    """
    (folder,) = folders
    root = os.fsencode(folder)
    names: list[bytes] = []
    watched: list[bytes] = []
    seen: set[tuple[int, int]] = set()
    others = 0
    to_walk, links = [b""], list[bytes]()
    while to_walk or links:
        prefix = to_walk.pop() if to_walk else links.pop(0)
        path = root + b"/" + prefix
        try:
            status = os.stat(path)  # noqa: PTH116 (bytes)
        except OSError as error:
            raise DataError(f"{os.fsdecode(path)}: cannot be read ({error.strerror})") from error
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        watched.append(path)
        for entry in entries(path):
            if entry.is_dir(follow_symlinks=False):
                to_walk.append(prefix + entry.name + b"/")
            elif is_image_name(entry.name) and entry.is_file():
                names.append(prefix + entry.name)
            elif entry.is_dir():
                links.append(prefix + entry.name + b"/")
            else:
                others += 1
        links.sort()
    if not names:
        raise DataError(
            f"no images in {folder} ({others} other files); looked at any depth for "
            f"{' '.join(sorted(IMAGE_EXTENSIONS))}, in upper or lower case"
        )
    names.sort()
    warnings = [f"{folder}: {others} files that are no images are passed over"] if others else []
    first_level = [name.partition(b"/") for name in names]
    class_names = sorted({name for name, slash, _ in first_level if slash})
    if len(class_names) < 2 or not all(slash for _, slash, _ in first_level):
        return Listing(ImageDataset(folder, Strings.of(names), None, ()), watched, warnings)
    number = {name: label for label, name in enumerate(class_names)}
    labels = np.fromiter((number[name] for name, *_ in first_level), np.int64, len(names))
    decoded = tuple(name.decode("utf-8", "backslashreplace") for name in class_names)
    return Listing(ImageDataset(folder, Strings.of(names), labels, decoded), watched, warnings)
