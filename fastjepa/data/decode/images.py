"""Encoded images: what their headers say, which are refused, and what every decoder makes of them."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from fastjepa.errors import DataError

# Pillow's own limit on pixels warns, or raises, by a figure of its own. Ours is data.max_pixels.
Image.MAX_IMAGE_PIXELS = None

# What the readers raise on a file that is damaged or not what its header says.
READ_ERRORS = (
    OSError,
    EOFError,
    SyntaxError,
    ValueError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    RuntimeError,
    struct.error,
    zlib.error,
)

# All that is read: others of Pillow's many readers are old, or run programs.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")

_JPEG, _START_OF_SCAN, _END_OF_IMAGE = b"\xff\xd8\xff", b"\xff\xda", b"\xff\xd9"


class BadImage(DataError):
    """An image that cannot be used; the message is the reason."""


class BadImages(DataError):
    """Some images of a batch cannot be used."""

    def __init__(self, bad: Mapping[int, str]) -> None:
        super().__init__("; ".join(f"image {position} of the batch: {reason}" for position, reason in bad.items()))
        self.bad = bad
        """Position in the batch -> reason."""


@dataclass(frozen=True, eq=False)
class EncodedImage:
    """A file's bytes, and what its header says."""

    data: bytes
    height: int
    width: int
    format: str
    """One of FORMATS."""
    plain_jpeg: bool = False
    """A JPEG file in grey or YCbCr, which libjpeg-turbo decodes by itself."""
    animated: bool = False
    """It has several frames, of which the first one counts."""

    def open(self) -> Image.Image:
        """By Pillow, afresh: an image that was decoded once would keep its pixels."""
        return Image.open(io.BytesIO(self.data), formats=[self.format])


class Decoder(Protocol):
    """Encoded images to a batch of pixels.

    Decoders agree on this: the stored pixels, without EXIF rotation (but for TIFF, which Pillow itself rotates; both as
    torchvision's ImageFolder); the first frame; alpha dropped, palettes expanded, CMYK converted, 16 bits scaled to 8; RGB
    or grey; the box cut out; resized to data.image_size, bilinear with antialiasing, in 8 bits (as torchvision's
    RandomResizedCrop on a PIL image); mirrored left to right where asked for. Their pixels differ by rounding;
    tests/data/decode/test_decoders.py holds the bounds.
    """

    def decode(
        self, images: Sequence[EncodedImage], boxes: npt.NDArray[np.int32], flips: npt.NDArray[np.bool_]
    ) -> Tensor:
        """Decode one batch.

        Args:
            images: B images, at most the largest batch that the decoder was made for.
            boxes: int32 [B, 4]: top, left, height, width in pixels, inside the images.
            flips: bool [B]: True to mirror.

        Returns:
            uint8 [B, C, H, W], contiguous, on the device where they were decoded.

        Raises:
            BadImages: some cannot be decoded; the others can.
        """
        ...


def read_header(data: bytes, max_pixels: int) -> EncodedImage:
    """What an image's header says: the pixels are not decoded.

    Raises:
        BadImage: not an image of FORMATS, or one that is cut short, has more than `max_pixels` pixels, or pixels that are no
            integers.
    """
    image = _jpeg_header(data) if data.startswith(_JPEG) else _other_header(data)
    if image.height * image.width > max_pixels:
        raise BadImage(f"{image.width} x {image.height} pixels, expected at most data.max_pixels = {max_pixels}")
    if image.format == "JPEG" and _is_cut_short(data):
        raise BadImage("truncated: the JPEG file has no end")
    return image


def _jpeg_header(data: bytes) -> EncodedImage:
    try:
        height, width, colour, _ = simplejpeg.decode_jpeg_header(data, strict=False)
    except (ValueError, KeyError):  # damaged, or of an unusual subsampling: Pillow will say
        return _other_header(data)
    if colour in ("YCbCr", "Gray"):
        return EncodedImage(data, height, width, "JPEG", plain_jpeg=True)
    return _other_header(data)


def _other_header(data: bytes) -> EncodedImage:
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        animated = bool(getattr(image, "is_animated", False)) and image.format in ("AVIF", "GIF", "PNG", "WEBP")
    except UnidentifiedImageError:
        raise BadImage("not an image, or damaged in its header") from None
    except READ_ERRORS as error:
        raise BadImage(f"damaged in its header: {describe(error)}") from error
    if image.mode == "F":
        raise BadImage("floating-point pixels, whose range is unknown; expected integers")
    if image.mode == "I" and image.format == "TIFF":  # of PNG and PPM files it is 16 bits
        raise BadImage("32-bit pixels, whose range is unknown; expected 8 or 16 bits")
    # A JPEG file of several pictures, of which the first one counts.
    kind = "JPEG" if image.format == "MPO" else str(image.format)
    return EncodedImage(data, image.height, image.width, kind, animated=animated)


def _is_cut_short(jpeg: bytes) -> bool:
    """Whether there is no end marker behind the start of the scan (a thumbnail before it has one of its own). Nothing need
    be decoded: the marker cannot occur within a scan. Cameras and phones put other data behind it."""
    if jpeg.endswith(_END_OF_IMAGE):
        return False
    position = 2
    while (marker := jpeg[position : position + 2]) != _START_OF_SCAN:
        if marker == b"\xff\xff":  # a fill byte
            position += 1
        elif len(marker) < 2 or marker[0] != 0xFF:
            return True
        else:
            position += 2 + int.from_bytes(jpeg[position + 2 : position + 4])
    return jpeg.find(_END_OF_IMAGE, position) < 0


def describe(error: BaseException) -> str:
    """An error in a few words, without a path."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
