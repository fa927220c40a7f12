"""A plain second implementation of the mask sampler, for tests: block sizes by the paper's text, one image at a time."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from fastjepa.errors import ConfigError
from fastjepa.objectives.ijepa.block_sizes import MaskConfig, check_grid
from fastjepa_kernels import MaskRules
from fastjepa_kernels.philox import DOMAIN_BLOCK_POSITION, DOMAIN_BLOCK_SIZE, DOMAIN_BUDGET, philox4x32
from fastjepa_kernels.reference import (
    ImageMasks,
    cut_masks_reference,
    image_masks_reference,
    mask_words_reference,
)

NUM_TARGET_BLOCKS = {"block": 1, "random": 1, "rasterized": 3}
"""What each strategy but multiblock, which takes any number, expects as `num_target_blocks`."""


class PlainSizes(NamedTuple):
    """The block sizes of a step, in patches; blocks are (height, width)."""

    target_count: int
    target: tuple[int, int]
    context: tuple[int, int]


def plain_sizes(config: MaskConfig, h: int, w: int, u: tuple[float, float, float]) -> PlainSizes:
    """Compute block sizes from three numbers in [0, 1): for the target's scale, its aspect, and the context's scale."""
    official = config.mode == "official"
    limit_h, limit_w = (h - 1, w - 1) if official else (h, w)

    def size(count: int, aspect: float) -> tuple[int, int]:
        block_h, block_w = round(math.sqrt(count * aspect)), round(math.sqrt(count / aspect))
        return min(max(block_h, 1), limit_h), min(max(block_w, 1), limit_w)

    (s0, s1), (a0, a1), (c0, c1) = config.target_scale, config.target_aspect_ratio, config.context_scale
    count = math.floor(h * w * (s0 + u[0] * (s1 - s0)))
    aspect = a0 + (u[0] if official else u[1]) * (a1 - a0)
    return PlainSizes(count, size(count, aspect), size(math.floor(h * w * (c0 + u[2] * (c1 - c0))), h / w))


def plain_rules(config: MaskConfig, h: int, w: int, sizes: PlainSizes) -> MaskRules:
    """Everything that the masks of a step share."""
    min_context = config.min_keep + 1
    if config.mode == "budget":
        min_context = max(min_context, math.floor(config.context_budget * h * w))
    lost = 1 if config.mode == "official" else 0
    return MaskRules(
        strategy=config.strategy,
        mode=config.mode,
        grid_h=h,
        grid_w=w,
        reach_h=h - lost,
        reach_w=w - lost,
        target_h=sizes.target[0],
        target_w=sizes.target[1],
        context_h=sizes.context[0],
        context_w=sizes.context[1],
        target_count=sizes.target_count,
        num_target_blocks=config.num_target_blocks,
        min_context=min_context,
    )


def sizes_of_step(config: MaskConfig, h: int, w: int, *, seed: int, step: int) -> PlainSizes:
    """The block sizes that follow from the random words which the sampler uses for a step."""
    words = philox4x32(np.zeros(1, np.int64), DOMAIN_BLOCK_SIZE, 0, step, seed=seed)
    u = [int(word[0]) / 2**32 for word in words]
    return plain_sizes(config, h, w, (u[0], u[1], u[2]))


def plain_batch(config: MaskConfig, h: int, w: int, ids: list[int], step: int = 0, seed: int = 0) -> list[ImageMasks]:
    """Masks of the plain implementation, from the random words that the sampler uses."""
    sizes = sizes_of_step(config, h, w, seed=seed, step=step)
    streams = [[mask_words_reference(d, i, step, seed) for d in (DOMAIN_BLOCK_POSITION, DOMAIN_BUDGET)] for i in ids]
    images = [image_masks_reference(plain_rules(config, h, w, sizes), *stream) for stream in streams]
    return cut_masks_reference(images) if config.mode == "official" else images


def random_step(config: MaskConfig, h: int, w: int, num_images: int, rng: np.random.Generator) -> list[ImageMasks]:
    """Masks of the plain implementation for one step, from a generator of NumPy; not cut to the batch minimum."""

    def word() -> int:
        return int(rng.integers(2**32))

    rules = plain_rules(config, h, w, plain_sizes(config, h, w, three_uniforms(rng)))
    return [image_masks_reference(rules, word, word) for _ in range(num_images)]


def three_uniforms(rng: np.random.Generator) -> tuple[float, float, float]:
    """Three numbers in [0, 1)."""
    a, b, c = rng.random(3).tolist()
    return a, b, c


def is_accepted(config: MaskConfig, h: int, w: int) -> bool:
    """True if `check_grid` accepts the grid."""
    try:
        check_grid(config, h, w)
    except ConfigError:
        return False
    return True
