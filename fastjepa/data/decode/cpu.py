"""Decoding on the CPU (`data.loader: turbo`): JPEG by libjpeg-turbo, all other formats by Pillow, resizing by PyTorch.

This decoder works wherever Python does, and it is the reference for DALI. Its pixels equal those of Pillow within one level
of 255 (two levels in one pixel of 20 million). Large JPEG files are the exception: they are decoded at 1/2, 1/4 or 1/8 of
their size (`data.dct_scaling`).
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor

import numpy as np
import numpy.typing as npt
import simplejpeg
import torch
from PIL import Image
from torch import Tensor

from fastjepa.config import DataConfig
from fastjepa.data.decode.images import READ_ERRORS, EncodedImage
from fastjepa.data.image_errors import BadImage, BadImages, reason_of
from fastjepa.data.order import dct_scale
from fastjepa.data.threads import for_each

Pixels = npt.NDArray[np.uint8]

_SIMPLEJPEG_COLOURS = {"RGB": "RGB", "L": "GRAY"}  # Pillow's mode -> simplejpeg's name for it


class CPUDecoder:
    """`Decoder` on the threads of a pool; decoding and resizing release the interpreter lock."""

    def __init__(self, config: DataConfig, pool: Executor, *, pin_memory: bool = False) -> None:
        """
        Args:
            config: the data settings.
            pool: data.num_threads threads.
            pin_memory: put the batches into page-locked memory, from which they are copied to a GPU in the background.
        """
        self._config, self._pool, self._pin_memory = config, pool, pin_memory
        self._mode = "RGB" if config.in_channels == 3 else "L"

    def decode(
        self, images: Sequence[EncodedImage], boxes: npt.NDArray[np.int32], flips: npt.NDArray[np.bool_]
    ) -> Tensor:
        """See `Decoder`."""
        shape = (len(images), self._config.in_channels, *self._config.image_hw)
        batch = torch.empty(shape, dtype=torch.uint8, pin_memory=self._pin_memory)
        box_lists = boxes.tolist()

        def decode_one(position: int) -> None:
            out = batch[position : position + 1]
            self._decode_into(out, images[position], box_lists[position], bool(flips[position]))

        if bad := for_each(decode_one, len(images), self._pool, self._config.num_threads):
            raise BadImages(bad)
        return batch

    def _decode_into(self, out: Tensor, image: EncodedImage, box: tuple[int, int, int, int], flip: bool) -> None:
        """Decode one image into `out`, uint8 [1, C, H, W]."""
        try:
            pixels = self._crop(image, box)
        except READ_ERRORS as error:
            raise BadImage(reason_of(error)) from error
        source = torch.from_numpy(pixels).permute(2, 0, 1)[None]
        torch.ops.aten._upsample_bilinear2d_aa.out(source, out.shape[2:], False, None, None, out=out)
        if flip:
            out.copy_(out.flip(3))

    def _crop(self, image: EncodedImage, box: tuple[int, int, int, int]) -> Pixels:
        """The pixels of the box, uint8 [h, w, C], contiguous; of a JPEG file at 1/k of its size, where the box is large
        enough.

        JPEG's inverse transform has a low-pass filter of its own, before that of the resizing. It changes an image by 0.25
        levels of 255 on average at 1/2, and by 0.5 below; the tests hold 0.5 and 0.65.
        """
        top, left, height, width = box
        if not image.plain_jpeg:
            crop = image.open().crop((left, top, left + width, top + height))
            return np.array(_eight_bits(crop, self._mode)).reshape(height, width, -1)
        k = int(dct_scale(self._config, np.array(height), np.array(width)))
        if any(side % k for side in box):  # only boxes of fastjepa.data.order are multiples of k
            k = 1
        pixels = simplejpeg.decode_jpeg(
            image.data,
            _SIMPLEJPEG_COLOURS[self._mode],
            min_height=-(-image.height // k),
            min_width=-(-image.width // k),
            strict=False,
        )
        top, left, height, width = (side // k for side in box)
        return np.ascontiguousarray(pixels[top : top + height, left : left + width])


def _eight_bits(image: Image.Image, mode: str) -> Image.Image:
    """The image as RGB or L, with 8 bits per channel."""
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow's own conversion clips at 255
        values = np.asarray(image).clip(0, 65535).astype(np.uint32)
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    image.info.pop("transparency", None)  # Pillow would warn, or mix in the alpha that is dropped here
    return image.convert(mode)
