"""Reads images by index: bytes, headers, crops, pixels. Another image takes the place of a bad one."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import NamedTuple

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
    """One batch of B images, in one or more views."""

    pixels: tuple[Tensor, ...]
    """Per view, uint8 [B, C, H, W]."""
    sample_ids: Ints
    """int64 [B]: indices in the data set, those of the replacements where images were bad."""
    boxes: tuple[Boxes, ...]
    """Per view, int32 [B, 4]: top, left, height, width of the crops, in pixels of the images."""
    flips: tuple[npt.NDArray[np.bool_], ...]
    """Per view, [B]: True where the crop is mirrored."""
    read_seconds: float
    """Seconds spent reading files and headers."""
    decode_seconds: float
    """Seconds spent decoding and resizing."""


class ViewDecoder(NamedTuple):
    """A view of the images and its decoder. Views do not share a decoder, which may reuse the memory of its last output."""

    settings: DataConfig
    """The data settings with the view's crop."""
    decoder: Decoder


class Reader:
    """Reads the images of a run. An image's file is read once for all its views."""

    def __init__(
        self, dataset: ImageDataset, views: Sequence[ViewDecoder], seed: int, pool: Executor, bad: BadSamples
    ) -> None:
        self._dataset, self._views, self._seed = dataset, views, seed
        self._config = views[0].settings  # its settings for files are the same for all views
        self._pool, self._bad = pool, bad

    def read(self, wanted: Ints, epoch: int) -> Images:
        """Read the images at `wanted`, int64 [B], with their crops of this epoch.

        Another image takes the place of a bad one (`replacement`), with the crop that it has at its own index.

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
                try:
                    pixels, boxes, mirrored = self._decode(batch, indices, epoch)
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

    def _decode(
        self, batch: list[EncodedImage], indices: Ints, epoch: int
    ) -> tuple[tuple[Tensor, ...], tuple[Boxes, ...], tuple[npt.NDArray[np.bool_], ...]]:
        """Crop and decode images: pixels, boxes and flips of every view.

        Raises:
            BadImages: images that cannot be decoded.
        """
        sizes = sizes_of(batch)
        pixels, all_boxes, all_flips = [], [], []
        for view, (settings, decoder) in enumerate(self._views):
            boxes = crop_boxes(settings, seed=self._seed, epoch=epoch, indices=indices, sizes=sizes, view=view)
            mirrored = flips(settings, seed=self._seed, epoch=epoch, indices=indices, view=view)
            pixels.append(decoder.decode(batch, boxes, mirrored))
            all_boxes.append(boxes)
            all_flips.append(mirrored)
        return tuple(pixels), tuple(all_boxes), tuple(all_flips)

    def _fetch(self, indices: Ints, images: list[EncodedImage | None]) -> Mapping[int, str]:
        """Read the images that are still None into `images`. Return why images are bad, by position."""
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
    """Read the files and headers of some images.

    Returns:
        The images, None for bad ones, and why images are bad, by position.
    """
    images: list[EncodedImage | None] = [None] * len(indices)

    def read(position: int) -> None:
        images[position] = read_image(dataset, int(indices[position]), config)

    return images, for_each(read, len(indices), pool, config.num_threads)


def read_image(dataset: ImageDataset, index: int, config: DataConfig) -> EncodedImage:
    """Read an image's file and its header.

    Raises:
        BadImage: it cannot be read, or its header says that it cannot be used.
    """
    # The most bytes that a format needs: four channels of 16 bits per pixel, and 1 MiB for header and colour profile.
    return read_header(dataset.read(index, 8 * config.max_pixels + (1 << 20)), config.max_pixels)


def sizes_of(images: Sequence[EncodedImage]) -> npt.NDArray[np.int32]:
    """Heights and widths of images, int32 [B, 2]."""
    return np.array([(image.height, image.width) for image in images], np.int32)
