"""Decoding on the CPU: JPEG by libjpeg-turbo, all other formats by Pillow, resizing by PyTorch's SIMD kernel.

Works wherever Python does, and is the reference for the other decoder. Pixels equal those of Pillow within one level of 255,
but for large JPEG files, which are decoded at a half, a quarter or an eighth of their size (`data.dct_scaling`).
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
from fastjepa.data.images import READ_ERRORS, BadImage, BadImages, EncodedImage, describe
from fastjepa.data.threads import for_each

Pixels = npt.NDArray[np.uint8]

# A JPEG file is decoded at 1/k of its size if the box then still has this many pixels for each one of the result. The
# inverse transform's own low-pass filter comes before ours; with 2 it changes an image by 0.25 levels of 255 on average at
# 1/2, by 0.5 below (the tests hold 0.5 and 0.65).
_PIXELS_LEFT = 2


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
        scale = self._scale(image, box)
        try:
            pixels = self._crop(image, box) if scale == 1 else self._reduced(image, box, scale)
        except READ_ERRORS as error:
            raise BadImage(describe(error)) from error
        if scale == 1:
            source = torch.from_numpy(pixels).permute(2, 0, 1)[None]
            torch.ops.aten._upsample_bilinear2d_aa.out(source, out.shape[2:], False, None, None, out=out)
        else:
            out.numpy()[0] = pixels.transpose(2, 0, 1)
        if flip:
            out.copy_(out.flip(3))

    def _scale(self, image: EncodedImage, box: tuple[int, int, int, int]) -> int:
        """The largest k of 1, 2, 4, 8 such that 1/k of a JPEG file's pixels will do."""
        if not (self._config.dct_scaling and image.plain_jpeg):
            return 1
        out_h, out_w = self._config.image_hw
        spare = min(box[2] // out_h, box[3] // out_w) // _PIXELS_LEFT
        return next(k for k in (8, 4, 2, 1) if k <= max(spare, 1))

    def _crop(self, image: EncodedImage, box: tuple[int, int, int, int]) -> Pixels:
        """The box, uint8 [h, w, C], contiguous."""
        top, left, height, width = box
        if image.plain_jpeg:
            pixels = simplejpeg.decode_jpeg(image.data, self._colour, strict=False)
            return np.ascontiguousarray(pixels[top : top + height, left : left + width])
        crop = image.open().crop((left, top, left + width, top + height))
        return np.array(_eight_bits(crop, self._mode)).reshape(height, width, -1)

    @property
    def _colour(self) -> str:
        return "RGB" if self._mode == "RGB" else "GRAY"

    def _reduced(self, image: EncodedImage, box: tuple[int, int, int, int], k: int) -> Pixels:
        """The resized box, uint8 [H, W, C], of the image at 1/k of its size. There the box ends between pixels, which Pillow
        can resize from and PyTorch can not."""
        top, left, height, width = box
        pixels = simplejpeg.decode_jpeg(
            image.data, self._colour, min_height=-(-image.height // k), min_width=-(-image.width // k), strict=False
        )
        first, last = (top // k, left // k), (-(-(top + height) // k), -(-(left + width) // k))
        part = Image.fromarray(
            np.ascontiguousarray(pixels[first[0] : last[0], first[1] : last[1]]).squeeze(), self._mode
        )
        within = (left / k - first[1], top / k - first[0], (left + width) / k - first[1], (top + height) / k - first[0])
        out_h, out_w = self._config.image_hw
        return np.asarray(part.resize((out_w, out_h), Image.Resampling.BILINEAR, box=within)).reshape(out_h, out_w, -1)


def _eight_bits(image: Image.Image, mode: str) -> Image.Image:
    """RGB or L, 8 bits per channel."""
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow's own conversion clips at 255
        values = np.asarray(image).clip(0, 65535).astype(np.uint32)
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    image.info.pop("transparency", None)  # alpha is dropped, but Pillow would warn, or mix it in
    return image.convert(mode)
