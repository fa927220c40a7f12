"""Reads images by index: bytes, headers, crops, pixels; another image takes the place of a bad one."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from fastjepa.config import DataConfig
from fastjepa.data.bad_samples import BadSamples
from fastjepa.data.dataset import ImageDataset, Ints
from fastjepa.data.decode.images import Decoder, EncodedImage, read_header
from fastjepa.data.image_errors import BadImages
from fastjepa.data.order import Boxes, crop_boxes, flips, replacement
from fastjepa.data.threads import for_each


@dataclass(frozen=True)
class Images:
    """One batch of B images."""

    pixels: Tensor
    """uint8 [B, C, H, W]."""
    sample_ids: Ints
    """int64 [B]: indices in the data set, those of the replacements where images were bad."""
    boxes: Boxes
    """int32 [B, 4]: top, left, height, width of the crops, in pixels of the images."""
    flips: npt.NDArray[np.bool_]
    """[B]: True where the crop is mirrored."""
    read_seconds: float
    """Reading files and headers."""
    decode_seconds: float
    """Decoding and resizing."""


class Reader:
    """Reads the images of a run."""

    def __init__(
        self, dataset: ImageDataset, config: DataConfig, seed: int, decoder: Decoder, pool: Executor, bad: BadSamples
    ) -> None:
        self._dataset, self._config, self._seed = dataset, config, seed
        self._decoder, self._pool, self._bad = decoder, pool, bad

    def read(self, wanted: Ints, epoch: int) -> Images:
        """The images at `wanted`, int64 [B], cropped as their epoch has them; see `replacement` for bad ones, which get the
        crop of the image that they really are.

        Raises:
            DataError: too many images are bad.
        """
        indices, attempts = wanted.copy(), np.zeros_like(wanted)
        images: list[EncodedImage | None] = [None] * len(wanted)
        read_seconds = decode_seconds = 0.0
        while True:
            started = time.perf_counter()
            bad = self._fetch(indices, images)
            fetched = time.perf_counter()
            read_seconds += fetched - started
            if not bad:
                batch = [image for image in images if image is not None]
                boxes = crop_boxes(self._config, seed=self._seed, epoch=epoch, indices=indices, sizes=sizes_of(batch))
                mirrored = flips(self._config, seed=self._seed, epoch=epoch, indices=indices)
                try:
                    pixels = self._decoder.decode(batch, boxes, mirrored)
                    decode_seconds += time.perf_counter() - fetched
                    return Images(pixels, indices, boxes, mirrored, read_seconds, decode_seconds)
                except BadImages as error:
                    bad = error.bad
                decode_seconds += time.perf_counter() - fetched
            for position, reason in bad.items():
                self._bad.add(int(indices[position]), reason)
                images[position] = None
                attempts[position] += 1
                indices[position] = replacement(
                    int(wanted[position]),
                    int(attempts[position]),
                    seed=self._seed,
                    epoch=epoch,
                    num_images=len(self._dataset),
                )

    def _fetch(self, indices: Ints, images: list[EncodedImage | None]) -> Mapping[int, str]:
        """Read the images that are not there yet; the reasons of the bad ones, by position."""
        missing = [position for position, image in enumerate(images) if image is None]
        known = {p: reason for p in missing if (reason := self._bad.reason(int(indices[p]))) is not None}
        if known:
            return known
        fetched, bad = fetch(self._dataset, indices[missing], self._config, self._pool)
        for position, image in zip(missing, fetched, strict=True):
            images[position] = image
        return {missing[i]: reason for i, reason in bad.items()}


def fetch(
    dataset: ImageDataset, indices: Ints, config: DataConfig, pool: Executor
) -> tuple[list[EncodedImage | None], dict[int, str]]:
    """The files and headers of some images, None for bad ones; and the reasons of these, by position."""
    images: list[EncodedImage | None] = [None] * len(indices)

    def read(position: int) -> None:
        images[position] = read_image(dataset, int(indices[position]), config)

    return images, for_each(read, len(indices), pool, config.num_threads)


def read_image(dataset: ImageDataset, index: int, config: DataConfig) -> EncodedImage:
    """An image's file, and what its header says.

    Raises:
        BadImage: it cannot be read, or its header says that it cannot be used.
    """
    # No format needs more for a pixel than four channels of 16 bits, and some for its header and colour profile.
    return read_header(dataset.read(index, 8 * config.max_pixels + (1 << 20)), config.max_pixels)


def sizes_of(images: Sequence[EncodedImage]) -> npt.NDArray[np.int32]:
    """Heights and widths, int32 [B, 2]."""
    return np.array([(image.height, image.width) for image in images], np.int32)
