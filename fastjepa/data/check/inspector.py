"""The inspector: looks at one image as training would, and tells what it is or why it is bad."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
from PIL import Image

from fastjepa.config import DataConfig
from fastjepa.data.dataset import ImageDataset
from fastjepa.data.decode.cpu import CPUDecoder
from fastjepa.data.decode.images import READ_ERRORS, EncodedImage
from fastjepa.data.image_errors import BadImage, BadImages
from fastjepa.data.reader import read_image

_COLOURS = {
    "1": "black and white",
    "L": "grey",
    "LA": "grey with alpha",
    "P": "palette",
    "PA": "palette with alpha",
    "RGBA": "RGB with alpha",
}
_ORIENTATION = 0x0112  # tag of EXIF: 1 is upright, 2 to 8 are turned or mirrored
_BITS_PER_SAMPLE = 258  # tag of TIFF


class Found(NamedTuple):
    """What the inspector found in a usable image."""

    height: int
    width: int
    num_bytes: int
    digest: bytes
    """16 bytes: BLAKE2b of the encoded image."""
    kind: str
    """Format and colour mode, for example `JPEG RGB`."""
    animated: bool
    rotated: bool
    """True: EXIF asks for the image to be turned or mirrored, which no decoder does."""
    damage: str | None
    """What is wrong with the image's data; training would use what can be decoded of it."""


class Inspector:
    """Looks at an image as training would, on any thread."""

    def __init__(self, config: DataConfig, *, headers_only: bool) -> None:
        self._config, self._headers_only = config, headers_only
        # The whole image is decoded, and one pixel of it is kept.
        one_pixel = dataclasses.replace(config, image_size=1, dct_scaling=False, num_threads=1)
        self._decoder = CPUDecoder(one_pixel, _SameThread())

    def __call__(self, dataset: ImageDataset, index: int) -> Found:
        """Look at one image.

        Raises:
            BadImage: training would take another image in its place.
        """
        try:
            image = read_image(dataset, index, self._config)
            kind, rotated = _kind(image), _is_rotated(image)
            damage = None if self._headers_only else self._decode(image)
        except BadImage:
            raise
        except Exception as error:
            error.add_note(f"while looking at {dataset.name(index)}, which would end a run in the same way")
            raise
        digest = hashlib.blake2b(image.data, digest_size=16).digest()
        return Found(image.height, image.width, len(image.data), digest, kind, image.animated, rotated, damage)

    def _decode(self, image: EncodedImage) -> str | None:
        """Decode an image completely. Returns what is wrong with it if it is usable all the same."""
        damage = None
        if image.plain_jpeg:
            try:
                simplejpeg.decode_jpeg(image.data, "RGB", strict=True)
                return None
            except ValueError as error:
                damage = str(error)
        try:
            self._decoder.decode([image], np.array([[0, 0, 1, 1]], np.int32), np.zeros(1, bool))
        except BadImages as error:
            raise BadImage(error.bad[0]) from error
        return damage


class _SameThread(Executor):
    """A pool without threads: it works on the calling thread, which is one of a pool already."""

    def map(self, fn: Callable[..., Any], *iterables: Iterable[Any], **_: Any) -> Iterator[Any]:
        return map(fn, *iterables)


def _kind(image: EncodedImage) -> str:
    """Format and colour mode, from the header."""
    if image.plain_jpeg:
        colour = simplejpeg.decode_jpeg_header(image.data, strict=False)[2]
        return f"{image.format} {'grey' if colour == 'Gray' else 'RGB'}"
    opened = image.open()
    mode = opened.mode
    if mode.startswith("I"):
        return f"{image.format} 16-bit grey"
    # Pillow's other modes are the same for 16 bits and 8.
    is_16 = image.format == "PNG" and image.data[24] == 16
    is_16 |= image.format == "TIFF" and 16 in getattr(opened, "tag_v2", {}).get(_BITS_PER_SAMPLE, ())
    return f"{image.format} {'16-bit ' if is_16 else ''}{_COLOURS.get(mode, mode)}"


def _is_rotated(image: EncodedImage) -> bool:
    """True if EXIF asks for the image to be turned or mirrored."""
    if image.plain_jpeg:
        start = image.data.find(b"Exif\0\0", 0, 1 << 17)
        exif = image.data[start : start + 0xFFFF] if image.data[max(start - 4, 0) : start - 2] == b"\xff\xe1" else b""
    else:
        exif = image.open().info.get("exif", b"")  # TIFF files have none here: Pillow turns them when it decodes
    try:
        tags = Image.Exif()
        tags.load(exif)
        return tags.get(_ORIENTATION) in range(2, 9)
    except READ_ERRORS:
        return False
