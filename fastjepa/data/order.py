"""The order of images, their crops and flips: pure functions of (seed, epoch, index), on a counter-based generator.

There is no state: every rank computes the same numbers, and a resumed run needs only the step number.

Boxes are int32 [B, 4]: top, left, height, width in pixels. Sizes are [B, 2]: height, width.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from fastjepa.config import DataConfig
from fastjepa.data.dataset import Ints
from fastjepa.errors import ConfigError
from fastjepa_kernels.philox import (
    DOMAIN_CROP,
    DOMAIN_ORDER,
    DOMAIN_REPLACEMENT,
    philox4x32,
    uniform_int,
    unit_interval,
)

Boxes = npt.NDArray[np.int32]

_CROP_ATTEMPTS = 10
_CROP_DRAWS = _CROP_ATTEMPTS + 1  # per view: one for each attempt, and one for the flip
_KEYS_AT_ONCE = 1 << 16  # fit into a core's cache: 14 million take 2.4 s instead of 7.5 s, and a third of the memory


def steps_per_epoch(num_images: int, global_batch_size: int) -> int:
    """Number of full batches in an epoch. The images left over are not seen in that epoch; each epoch leaves out others.

    Raises:
        ConfigError: there are fewer images than one batch needs.
    """
    if num_images < global_batch_size:
        raise ConfigError(
            f"global_batch_size = {global_batch_size}: the data set has {num_images} images, expected at least one batch; "
            f"use a smaller batch or more images"
        )
    return num_images // global_batch_size


def epoch_order(seed: int, epoch: int, num_images: int) -> Ints:
    """The permutation of an epoch, int64 [num_images]: images sorted by 64-bit random keys (stable, hence exact)."""
    keys = np.empty(num_images, np.int64)
    for start in range(0, num_images, _KEYS_AT_ONCE):
        chunk = keys[start : start + _KEYS_AT_ONCE]
        high, low, _, _ = philox4x32(np.arange(start, start + len(chunk)), DOMAIN_ORDER, 0, epoch, seed=seed)
        chunk[:] = (high << 32) | low
    return np.argsort(keys, kind="stable")


def batch_positions(
    step: int, micro_step: int, rank: int, *, world_size: int, micro_batch_size: int, accum: int
) -> Ints:
    """Positions of one rank's micro batch in the run's endless sequence of samples, int64 [micro_batch_size].

    The global batch of a step is world_size * micro_batch_size * accum consecutive positions. The micro batches of all
    ranks lie side by side in it, so a step sees the same set of samples however it is split.
    """
    across_ranks = world_size * micro_batch_size
    first = (step * accum + micro_step) * across_ranks + rank * micro_batch_size
    return np.arange(first, first + micro_batch_size, dtype=np.int64)


def crop_boxes(
    config: DataConfig, *, seed: int, epoch: int, indices: Ints, sizes: npt.NDArray[np.int32], view: int = 0
) -> Boxes:
    """Random crops by the rule of torchvision's RandomResizedCrop.

    Each of ten attempts draws an area, uniform in `crop_scale` times the image's area, and an aspect ratio, log-uniform in
    `crop_aspect`, and rounds width and height from them. The first attempt that fits is placed at a uniform position. If
    none fits, the crop is central and as large as `crop_aspect` allows. If `crop_scale` is None, the crop is the whole
    image. With `dct_scaling`, crops that are large enough for a scale of 1/k (`dct_scale`) begin and end at multiples of k
    pixels, and so at whole pixels of the scaled image.

    Args:
        config: crop settings of the view.
        seed: seed of the run.
        epoch: number of the epoch.
        indices: int64 [B], indices in the data set.
        sizes: int32 [B, 2], heights and widths of the images.
        view: number of the view. Each view draws numbers of its own.

    Returns:
        int32 [B, 4]; each row depends on (seed, epoch, its index, its size, view) alone.
    """
    height, width = sizes.astype(np.int64).T
    if config.crop_scale is None:
        return _aligned(config, 0 * height, 0 * width, height, width)
    attempts = view * _CROP_DRAWS + np.arange(_CROP_ATTEMPTS, dtype=np.int64)[:, None]
    words = philox4x32(attempts, DOMAIN_CROP, indices[None], epoch, seed=seed)  # four words [attempts, B]
    u_area, u_aspect = unit_interval(words[0]), unit_interval(words[1])
    area = _between(config.crop_scale, u_area) * (height * width)
    aspect = np.exp(_between((math.log(config.crop_aspect[0]), math.log(config.crop_aspect[1])), u_aspect))
    crop_w = np.rint(np.sqrt(area * aspect)).astype(np.int64)
    crop_h = np.rint(np.sqrt(area / aspect)).astype(np.int64)
    fits = (crop_w > 0) & (crop_w <= width) & (crop_h > 0) & (crop_h <= height)
    chosen = fits.argmax(axis=0), np.arange(len(indices))  # argmax gives the first attempt that fits, or 0
    central = _central(height, width, *config.crop_aspect)
    crop_h = np.where(fits[chosen], crop_h[chosen], central[:, 2])
    crop_w = np.where(fits[chosen], crop_w[chosen], central[:, 3])
    top = np.where(fits[chosen], uniform_int(words[2][chosen], height - crop_h + 1), central[:, 0])
    left = np.where(fits[chosen], uniform_int(words[3][chosen], width - crop_w + 1), central[:, 1])
    return _aligned(config, top, left, crop_h, crop_w)


def dct_scale(config: DataConfig, crop_h: Ints, crop_w: Ints) -> Ints:
    """The largest k of 1, 2, 4, 8 such that a crop may be taken from its image at 1/k of its size (`data.dct_scaling`).

    At that size each side of the crop still has at least twice the pixels of the result's. Without `dct_scaling` k is 1.
    """
    out_h, out_w = config.image_hw
    k = np.ones_like(crop_h)
    for scale in (2, 4, 8) if config.dct_scaling else ():
        k[(crop_h >= 2 * scale * out_h) & (crop_w >= 2 * scale * out_w)] = scale
    return k


def flips(config: DataConfig, *, seed: int, epoch: int, indices: Ints, view: int = 0) -> npt.NDArray[np.bool_]:
    """Draw the crops of a view that are mirrored left to right: bool [B], True with probability `flip`.

    Each entry is a pure function of (seed, epoch, index, view).
    """
    # The attempts at the crop use the draws before this one.
    draw = view * _CROP_DRAWS + _CROP_ATTEMPTS
    word, *_ = philox4x32(indices * 0 + draw, DOMAIN_CROP, indices, epoch, seed=seed)
    return unit_interval(word) < config.flip


def replacement(index: int, attempt: int, *, seed: int, epoch: int, num_images: int) -> int:
    """Index of the image that takes the place of a bad one. Try attempt 1, 2, ... until the image is not bad itself.

    The index is uniform over the data set, so that the samples of a lost shard are replaced by many different images. It is
    a function of (seed, epoch, index, attempt), so that it is the same on every rank and after a resume.
    """
    word, *_ = philox4x32(np.array(attempt), DOMAIN_REPLACEMENT, index, epoch, seed=seed)
    return int(uniform_int(word, num_images))


def central_boxes(config: DataConfig, sizes: npt.NDArray[np.int32]) -> Boxes:
    """The largest central boxes with the aspect ratio of the output, int32 [B, 4], for evaluation.

    `dct_scaling` acts as in `crop_boxes`.
    """
    height, width = sizes.astype(np.int64).T
    aspect = config.image_hw[1] / config.image_hw[0]
    return _aligned(config, *_central(height, width, aspect, aspect).astype(np.int64).T)


def _central(height: Ints, width: Ints, min_aspect: float, max_aspect: float) -> Boxes:
    """The largest central boxes whose width / height lies between the two aspect ratios."""
    crop_w = np.minimum(width, np.rint(height * max_aspect).astype(np.int64).clip(1))
    crop_h = np.minimum(height, np.rint(width / min_aspect).astype(np.int64).clip(1))
    return _boxes((height - crop_h) // 2, (width - crop_w) // 2, crop_h, crop_w)


def _aligned(config: DataConfig, top: Ints, left: Ints, height: Ints, width: Ints) -> Boxes:
    """Boxes whose edges are moved to multiples of the scale at which the image is decoded (`dct_scale`)."""
    k = dct_scale(config, height, width)
    return _boxes(top // k * k, left // k * k, height // k * k, width // k * k)


def _between(limits: tuple[float, float], u: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return limits[0] + u * (limits[1] - limits[0])


def _boxes(top: Ints, left: Ints, height: Ints, width: Ints) -> Boxes:
    return np.stack([top, left, height, width], axis=1).astype(np.int32)
