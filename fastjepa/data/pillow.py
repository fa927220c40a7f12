"""Decoding with Pillow: works wherever Python does, and is the reference for the other decoder."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from fastjepa.config import DataConfig
from fastjepa.data.images import PILLOW_ERRORS, BadImage, BadImages, describe, for_each


class PillowDecoder:
    """`Decoder` on the CPU, with data.num_threads threads (Pillow and NumPy release the interpreter lock)."""

    def __init__(self, config: DataConfig) -> None:
        self._config = config
        self._pool = ThreadPoolExecutor(config.num_threads, thread_name_prefix="fastjepa-pillow")
        # x / 255 normalised, as one multiplication and one addition; [C, 1, 1].
        std = np.asarray(config.std, np.float32)[:, None, None]
        self._scale = 1 / (255 * std)
        self._offset = -np.asarray(config.mean, np.float32)[:, None, None] / std

    def decode(self, paths: Sequence[str], boxes: npt.NDArray[np.int32]) -> Tensor:
        """See `Decoder`. A truncated file is bad wherever it is cut, for Pillow decodes the whole image."""
        images = np.empty((len(paths), self._config.in_channels, *self._config.image_hw), np.float32)

        def decode(position: int) -> None:
            pixels = self._pixels(paths[position], boxes[position])
            np.multiply(pixels, self._scale, out=images[position])
            images[position] += self._offset

        if bad := for_each(decode, len(paths), self._pool, self._config.num_threads):
            raise BadImages(bad)
        return torch.from_numpy(images)

    def _pixels(self, path: str, box: npt.NDArray[np.int32]) -> npt.NDArray[np.uint8]:
        """The resized crop of one image, uint8 [C, H, W]."""
        top, left, height, width = box.tolist()
        out_h, out_w = self._config.image_hw
        try:
            with Image.open(path) as image:
                size = image.size
                crop = image.crop((left, top, left + width, top + height))
            resized = _eight_bits(crop, self._config.in_channels).resize((out_w, out_h), Image.Resampling.BILINEAR)
        except PILLOW_ERRORS as error:
            raise BadImage(path, describe(error)) from error
        if left + width > size[0] or top + height > size[1]:  # Pillow would pad it
            raise BadImage(path, "smaller than it was when its header was read")
        return np.asarray(resized).reshape(out_h, out_w, -1).transpose(2, 0, 1)


def _eight_bits(image: Image.Image, in_channels: int) -> Image.Image:
    """RGB (3 channels) or grey (1), 8 bits per channel."""
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow's own conversion clips at 255
        values = np.asarray(image).clip(0, 65535).astype(np.uint32)
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    image.info.pop("transparency", None)  # alpha is dropped, but Pillow would warn, or mix it in
    return image.convert("RGB" if in_channels == 3 else "L")
