"""Decoding on the CPU: JPEG by libjpeg-turbo, all other formats by Pillow, resizing by PyTorch's SIMD kernel.

Works wherever Python does, and is the reference for the other decoder. Pixels equal those of Pillow within one level of 255
(two in one pixel of 20 million), but for large JPEG files, which are decoded at 1/2, 1/4 or 1/8 of their size
(`data.dct_scaling`).
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
from fastjepa.data.decode.images import READ_ERRORS, BadImage, BadImages, EncodedImage, describe
from fastjepa.data.order import dct_scale
from fastjepa.data.threads import for_each

Pixels = npt.NDArray[np.uint8]


_NAME_OF = {"RGB": "RGB", "L": "GRAY"}  # Pillow's modes, for simplejpeg


class TurboDecoder:
    """`Decoder` on the CPU, with the threads of a pool (decoding and resizing release the interpreter lock)."""

    def __init__(self, config: DataConfig, pool: Executor, *, pin_memory: bool = False) -> None:
        """
        Args:
            config: the data settings.
            pool: of data.num_threads threads.
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
        where = boxes.tolist()

        def decode(position: int) -> None:
            self._decode(images[position], where[position], bool(flips[position]), batch[position : position + 1])

        if bad := for_each(decode, len(images), self._pool, self._config.num_threads):
            raise BadImages(bad)
        return batch

    def _decode(self, image: EncodedImage, box: tuple[int, int, int, int], flip: bool, out: Tensor) -> None:
        """One image into uint8 [1, C, H, W]."""
        try:
            pixels = self._crop(image, box)
        except READ_ERRORS as error:
            raise BadImage(describe(error)) from error
        source = torch.from_numpy(pixels).permute(2, 0, 1)[None]
        torch.ops.aten._upsample_bilinear2d_aa.out(source, out.shape[2:], False, None, None, out=out)
        if flip:
            out.copy_(out.flip(3))

    def _crop(self, image: EncodedImage, box: tuple[int, int, int, int]) -> Pixels:
        """The box, uint8 [h, w, C], contiguous; of a JPEG file at 1/k of its size, where the box is large enough.

        The inverse transform's own low-pass filter comes before that of the resizing, which changes an image by 0.25 levels
        of 255 on average at 1/2, by 0.5 below (the tests hold 0.5 and 0.65).
        """
        top, left, height, width = box
        if not image.plain_jpeg:
            crop = image.open().crop((left, top, left + width, top + height))
            return np.array(_eight_bits(crop, self._mode)).reshape(height, width, -1)
        k = int(dct_scale(self._config, np.array(height), np.array(width)))
        if any(side % k for side in box):  # a box that is not of fastjepa.data.order
            k = 1
        pixels = simplejpeg.decode_jpeg(
            image.data,
            _NAME_OF[self._mode],
            min_height=-(-image.height // k),
            min_width=-(-image.width // k),
            strict=False,
        )
        top, left, height, width = (side // k for side in box)
        return np.ascontiguousarray(pixels[top : top + height, left : left + width])


def _eight_bits(image: Image.Image, mode: str) -> Image.Image:
    """RGB or L, 8 bits per channel."""
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow's own conversion clips at 255
        values = np.asarray(image).clip(0, 65535).astype(np.uint32)
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    image.info.pop("transparency", None)  # alpha is dropped, but Pillow would warn, or mix it in
    return image.convert(mode)
