"""Encoded images: what their headers say, which ones are refused, and what every decoder promises."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from fastjepa.data.image_errors import BadImage, reason_of

# Pillow warns or raises above a limit of its own. The limit here is data.max_pixels.
Image.MAX_IMAGE_PIXELS = None

# What Pillow and simplejpeg raise on a file that is damaged or not what its header says.
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

# The only formats that are read: Pillow's other readers are old, or run programs.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")

_JPEG, _START_OF_SCAN, _END_OF_IMAGE = b"\xff\xd8\xff", b"\xff\xda", b"\xff\xd9"


@dataclass(frozen=True, eq=False)
class EncodedImage:
    """The bytes of an image file, and what its header says."""

    data: bytes
    height: int
    width: int
    format: str
    """One of FORMATS."""
    plain_jpeg: bool = False
    """True: a JPEG file in grey or YCbCr, which libjpeg-turbo decodes by itself."""
    animated: bool = False
    """True: the file has several frames; the first one counts."""

    def open(self) -> Image.Image:
        """Open the image with Pillow, anew each time: an image that was decoded once would keep its pixels."""
        return Image.open(io.BytesIO(self.data), formats=[self.format])


class Decoder(Protocol):
    """Turns encoded images into a batch of pixels.

    All decoders keep these rules:

    - The stored pixels count: EXIF rotation is ignored, but for TIFF, which Pillow itself rotates (as torchvision's
      ImageFolder does, both).
    - Of several frames the first one counts. Alpha is dropped, palettes are expanded, CMYK is converted, 16 bits are scaled
      to 8. The result is RGB or grey.
    - The box is cut out and resized to data.image_size, bilinear with antialiasing, in 8 bits (as torchvision's
      RandomResizedCrop does with a PIL image), then mirrored left to right where asked for.

    The pixels of two decoders differ by rounding; tests/data/decode/test_dali.py holds the bounds.
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
            BadImages: it names every image that cannot be decoded; all others can.
        """
        ...


def read_header(data: bytes, max_pixels: int) -> EncodedImage:
    """Read an image's header. The pixels are not decoded.

    Raises:
        BadImage: the file is no image of FORMATS, is cut short, has more than `max_pixels` pixels, or has pixels that are no
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
    except (ValueError, KeyError):  # damaged, or an unusual subsampling: Pillow tells which
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
        raise BadImage(f"damaged in its header: {reason_of(error)}") from error
    if image.mode == "F":
        raise BadImage("floating-point pixels, whose range is unknown; expected integers")
    if image.mode == "I" and image.format == "TIFF":  # in PNG and PPM files, mode I is 16 bits
        raise BadImage("32-bit pixels, whose range is unknown; expected 8 or 16 bits")
    # MPO: a JPEG file of several pictures, of which the first one counts.
    kind = "JPEG" if image.format == "MPO" else str(image.format)
    return EncodedImage(data, image.height, image.width, kind, animated=animated)


def _is_cut_short(jpeg: bytes) -> bool:
    """True if no end marker follows the start of the scan.

    Nothing is decoded: the marker cannot occur within a scan. A thumbnail before the scan has an end marker of its own,
    and cameras and phones put other data behind the image.
    """
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
