"""What the decoders share: the size of an image by its header, and what is a bad image."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from fastjepa.errors import DataError

# Pillow's own limit on pixels warns, or raises, by a figure of its own. Ours is data.max_pixels.
Image.MAX_IMAGE_PIXELS = None

# What Pillow's readers raise on a file that is missing, damaged or not what its header says.
PILLOW_ERRORS = (
    OSError,
    EOFError,
    SyntaxError,
    ValueError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    struct.error,
    zlib.error,
)


class BadImage(DataError):
    """An image file that cannot be used, and why."""

    def __init__(self, path: str, reason: str) -> None:
        # A name that is not UTF-8 carries surrogates, which no log or terminal accepts.
        super().__init__(f"{path.encode('utf-8', 'backslashreplace').decode()}: {reason}")
        self.path = path
        self.reason = reason


class BadImages(DataError):
    """Some images of a batch cannot be used."""

    def __init__(self, bad: Mapping[int, BadImage]) -> None:
        super().__init__("; ".join(str(error) for error in bad.values()))
        self.bad = bad
        """Position in the batch -> error."""


class Decoder(Protocol):
    """Image files to a batch of tensors.

    Decoders agree on this: the stored pixels, without EXIF rotation (as torchvision's ImageFolder); alpha dropped,
    palettes expanded, CMYK converted, 16 bits scaled to 8; RGB or grey; the box cut out; resized to data.image_size,
    bilinear with antialiasing; (x / 255 - mean) / std. Their pixels differ by rounding.
    """

    def decode(self, paths: Sequence[str], boxes: npt.NDArray[np.int32]) -> Tensor:
        """Decode one batch.

        Args:
            paths: B files, at most the largest batch that the decoder was made for.
            boxes: int32 [B, 4]: top, left, height, width in pixels, inside the images.

        Returns:
            float32 [B, C, H, W], on the device where they were decoded.

        Raises:
            BadImages: some files cannot be decoded; the others can.
        """
        ...


def read_size(path: str, max_pixels: int) -> tuple[int, int]:
    """Height and width of an image, from its header: the pixels are not decoded.

    Raises:
        BadImage: missing, unreadable, empty, not an image, or more than `max_pixels` pixels.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
            mode = image.mode
    except UnidentifiedImageError:
        empty = Path(path).stat().st_size == 0
        raise BadImage(path, "empty file" if empty else "not an image, or damaged in its header") from None
    except PILLOW_ERRORS as error:
        raise BadImage(path, describe(error)) from error
    if height * width > max_pixels:
        raise BadImage(path, f"{width} x {height} pixels, expected at most data.max_pixels = {max_pixels}")
    if mode == "F":
        raise BadImage(path, "floating-point pixels, whose range is unknown; expected integers")
    return height, width


def describe(error: BaseException) -> str:
    """An error in a few words, without the path."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__


def read_sizes(
    paths: Sequence[str], max_pixels: int, pool: Executor, num_threads: int
) -> tuple[npt.NDArray[np.int32], dict[int, BadImage]]:
    """Sizes of many images, int32 [n, 2] (height, width), and the bad ones by position; their size is 0."""
    sizes = np.zeros((len(paths), 2), np.int32)

    def read(position: int) -> None:
        sizes[position] = read_size(paths[position], max_pixels)

    return sizes, for_each(read, len(paths), pool, num_threads)


def for_each(work: Callable[[int], None], count: int, pool: Executor, num_threads: int) -> dict[int, BadImage]:
    """Run work(0) to work(count - 1) on the pool's threads; those that raised BadImage are returned, by number."""
    bad: dict[int, BadImage] = {}

    def share(first: int) -> None:  # one task per thread: a task costs as much as a small image
        for position in range(first, count, num_threads):
            try:
                work(position)
            except BadImage as error:
                bad[position] = error

    list(pool.map(share, range(num_threads)))
    return dict(sorted(bad.items()))
