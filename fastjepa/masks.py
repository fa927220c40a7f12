"""Which patches are seen and which are predicted: the multi-block sampler of I-JEPA (paper, section 3), for whole batches.

A target block is a rectangle of patches; the context is a larger rectangle minus the target blocks. One block size for
the targets and one for the context are drawn per step and shared by all images; positions are drawn per image. All
draws are counter-based, so the masks are a pure function of (seed, step, sample index): the same on any device, at any
world size, in any split of the batch. (The cut of the `official` mode depends, by its definition, on the given batch.)

Block sizes are computed on the host, in float64; everything per image is integer arithmetic on the device of the sample
indices (`fastjepa_kernels.mask_sampling`, which also says which random words are used for what).

Shapes: B images, N patches in raster order, M target blocks.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from itertools import pairwise, product
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastjepa.config import MaskConfig, Pair
from fastjepa.errors import ConfigError
from fastjepa_kernels import MaskRules, mask_sampling
from fastjepa_kernels.philox import DOMAIN_BLOCK_SIZE, philox4x32, unit_interval
from fastjepa_kernels.ragged import Ragged

_LARGEST_UNIFORM = 1 - 2.0**-32


@dataclass(frozen=True)
class MaskBatch:
    """The masks of B images, packed. Indices are int64, on one device, in raster order within a sequence.

    A patch index is flat: image * N + patch.
    """

    num_images: int
    """B."""
    num_patches: int
    """N = grid_h * grid_w."""
    context_indices: Tensor
    """[T_c] patch indices of the context tokens."""
    context: Ragged
    """B sequences of context tokens."""
    target_indices: Tensor
    """[T_t] patch indices of the target tokens."""
    target: Ragged
    """B * M sequences of target tokens: b * M + m is block m of image b."""
    union_indices: Tensor
    """[T_u] patch indices of each image's union of target blocks."""
    union: Ragged
    """B sequences of union patches."""
    union_rows: Tensor
    """[T_t] row of each target token in the packed union."""
    predictor: Ragged
    """B * M sequences: b * M + m is the context tokens of image b, then the target tokens of its block m."""
    predictor_rows: Tensor
    """[T_p] row of each predictor token in cat([context tokens, one row per patch position]): context token t is row t,
    a target token at position j of N is row T_c + j."""
    predictor_target_rows: Tensor
    """[T_t] rows of the target tokens in the packed predictor sequences."""

    def to(self, device: torch.device) -> MaskBatch:
        def moved(value: Any) -> Any:
            return value.to(device) if isinstance(value, Tensor | Ragged) else value

        return replace(self, **{f.name: moved(getattr(self, f.name)) for f in fields(self)})

    def slices(self, num_images: int) -> Iterator[MaskBatch]:
        """The masks of the first `num_images` images, of the next, and so on. Reads lengths: for masks on the CPU."""
        blocks = self.target.num_seqs // self.num_images
        for first in range(0, self.num_images, num_images):
            stop = min(first + num_images, self.num_images)
            context, context_rows = self.context.slice(first, stop)
            target, target_rows = self.target.slice(first * blocks, stop * blocks)
            union, union_rows = self.union.slice(first, stop)
            predictor, predictor_rows = self.predictor.slice(first * blocks, stop * blocks)
            sources = self.predictor_rows[predictor_rows]
            # A context token's row counts from the slice's first, a position's from its number of context tokens.
            positions = sources >= self.context.total
            sources = sources - torch.where(positions, self.context.total - context.total, context_rows.start)
            yield MaskBatch(
                num_images=stop - first,
                num_patches=self.num_patches,
                context_indices=self.context_indices[context_rows] - first * self.num_patches,
                context=context,
                target_indices=self.target_indices[target_rows] - first * self.num_patches,
                target=target,
                union_indices=self.union_indices[union_rows] - first * self.num_patches,
                union=union,
                union_rows=self.union_rows[target_rows] - union_rows.start,
                predictor=predictor,
                predictor_rows=sources,
                predictor_target_rows=self.predictor_target_rows[target_rows] - predictor_rows.start,
            )


def sample_masks(
    config: MaskConfig, grid_h: int, grid_w: int, *, seed: int, step: int, sample_indices: Tensor
) -> MaskBatch:
    """The masks of one (micro) batch: a pure function of its arguments.

    The numbers of tokens are read back to the host, which waits for the current stream of the device: the loader does that
    in its thread, a batch ahead of the step.

    Args:
        config: the mask settings.
        grid_h, grid_w: rows and columns of patches.
        seed: of the run, in [0, 2^64).
        step: optimizer step, in [0, 2^32); all ranks and micro batches of a step share its block sizes.
        sample_indices: int64 [B], B > 0, the global index of each image; its device is that of the masks.

    Raises:
        ValueError: no valid mask exists (`check_grid`), or an argument is out of range (`mask_sampling`).
    """
    _check_grid_once(config, grid_h, grid_w)
    rules = _rules(config, _Grid.of(config, grid_h, grid_w), seed=seed, step=step)
    masks = mask_sampling(rules, seed=seed, step=step, sample_indices=sample_indices)
    totals, longest = masks.sizes.tolist()

    def ragged(kind: int, cu_seqlens: Tensor) -> Ragged:
        return Ragged(cu_seqlens, longest[kind], totals[kind])

    context, target = ragged(0, masks.context_cu_seqlens), ragged(1, masks.target_cu_seqlens)
    union, predictor = ragged(2, masks.union_cu_seqlens), ragged(3, masks.predictor_cu_seqlens)
    return MaskBatch(
        num_images=len(sample_indices),
        num_patches=rules.num_patches,
        context_indices=masks.context_indices[: context.total],
        context=context,
        target_indices=masks.target_indices[: target.total],
        target=target,
        union_indices=masks.union_indices[: union.total],
        union=union,
        union_rows=masks.union_rows[: target.total],
        predictor=predictor,
        predictor_rows=masks.predictor_rows[: predictor.total],
        predictor_target_rows=masks.predictor_target_rows[: target.total],
    )


def check_grid(config: MaskConfig, grid_h: int, grid_w: int) -> None:
    """Refuse a grid on which block sizes that can be drawn leave no valid mask, even at the best positions.

    Args:
        config: the mask settings.
        grid_h, grid_w: rows and columns of patches.

    Raises:
        ConfigError: a target can be empty, or every context too small unless a target block is given up.
    """
    grid = _Grid.of(config, grid_h, grid_w)
    where = f"on a grid of {grid.size} patches with masks.mode = {config.mode}"
    targets = "strategy" if config.strategy == "rasterized" else "target_scale"
    remedy = f"use smaller patches, larger images or another masks.{targets}"
    smallest_target, best_context, worst_case = _worst_case(config, grid)
    if smallest_target < 1:
        raise ConfigError(f"masks.{targets} = {getattr(config, targets)}: {where} a target can have no patch: {remedy}")
    needed = _min_context(config, grid)
    if best_context < needed:
        key = "context_budget" if needed > config.min_keep + 1 else "min_keep"
        raise ConfigError(
            f"masks.{key} = {getattr(config, key)}: {where} a context needs {needed} tokens or more, but {worst_case}"
            f" leaves {best_context} at best: lower masks.{key}, or {remedy}"
        )


_check_grid_once = functools.cache(check_grid)


# Block sizes, on the host


class _Size(NamedTuple):
    h: int
    w: int

    @property
    def area(self) -> int:
        return self.h * self.w

    def __str__(self) -> str:
        return f"{self.h}x{self.w}"


class _Grid(NamedTuple):
    size: _Size
    reach: _Size
    """The part at the top left that blocks reach: all of it; in official mode not the last row and column."""

    @staticmethod
    def of(config: MaskConfig, grid_h: int, grid_w: int) -> _Grid:
        lost = 1 if config.mode == "official" else 0
        return _Grid(_Size(grid_h, grid_w), _Size(grid_h - lost, grid_w - lost))

    @property
    def num_patches(self) -> int:
        return self.size.area

    @property
    def aspect(self) -> float:
        return self.size.h / self.size.w

    def block_size(self, count: int, aspect: float) -> _Size:
        """The block of about `count` patches with that height / width, clipped to what blocks reach."""
        h, w = round(math.sqrt(count * aspect)), round(math.sqrt(count / aspect))
        return _Size(min(max(h, 1), self.reach.h), min(max(w, 1), self.reach.w))


def _between(limits: Pair, u: float) -> float:
    return limits[0] + u * (limits[1] - limits[0])


def _min_context(config: MaskConfig, grid: _Grid) -> int:
    """Tokens that a context must have at least; in budget mode it is cut to exactly as many."""
    above = config.min_keep + 1
    return max(above, int(config.context_budget * grid.num_patches)) if config.mode == "budget" else above


def _rules(config: MaskConfig, grid: _Grid, *, seed: int, step: int) -> MaskRules:
    """The block sizes of one step, and what else its masks share."""
    draws = philox4x32(np.zeros(1, np.int64), DOMAIN_BLOCK_SIZE, 0, step, seed=seed)
    u_count, u_aspect, u_context, _ = (float(unit_interval(word)[0]) for word in draws)
    if config.mode == "official":
        u_aspect = u_count
    target_count = int(grid.num_patches * _between(config.target_scale, u_count))
    target = grid.block_size(target_count, _between(config.target_aspect_ratio, u_aspect))
    context_count = int(grid.num_patches * _between(config.context_scale, u_context))
    context = grid.block_size(context_count, grid.aspect)
    return MaskRules(
        strategy=config.strategy,
        mode=config.mode,
        grid_h=grid.size.h,
        grid_w=grid.size.w,
        reach_h=grid.reach.h,
        reach_w=grid.reach.w,
        target_h=target.h,
        target_w=target.w,
        context_h=context.h,
        context_w=context.w,
        target_count=target_count,
        num_target_blocks=config.num_target_blocks,
        min_context=_min_context(config, grid),
    )


def _drawable_counts(scale: Pair, grid: _Grid) -> range:
    first, last = (int(grid.num_patches * _between(scale, u)) for u in (0.0, _LARGEST_UNIFORM))
    return range(first, last + 1)


def _drawable_target_sizes(config: MaskConfig, grid: _Grid) -> set[_Size]:
    """Every size of a target block that a step can draw.

    For a given count the size is piecewise constant in the aspect: h changes where count * aspect is the square of a
    half-integer, w where count / aspect is. One aspect from each piece yields all sizes.
    """
    (s0, s1), aspects = config.target_scale, config.target_aspect_ratio
    squares = [(k + 0.5) ** 2 for k in range(max(grid.size))]
    sizes = set()
    for count in _drawable_counts(config.target_scale, grid):
        low, high = aspects
        if config.mode == "official" and s0 < s1:  # the numbers u that draw this count draw a part of the aspects only
            u0, u1 = ((c / grid.num_patches - s0) / (s1 - s0) for c in (count, count + 1))
            low, high = _between(aspects, max(u0, 0.0)), _between(aspects, min(u1, 1.0))
        changes = [a for square in squares for a in (square / count, count / square) if low < a < high]
        edges = sorted([low, *changes, high])
        sizes |= {grid.block_size(count, aspect) for aspect in (low, *((a + b) / 2 for a, b in pairwise(edges)))}
    return sizes


def _worst_case(config: MaskConfig, grid: _Grid) -> tuple[int, int, str]:
    """Over all sizes that can be drawn: the patches of the smallest target; the tokens of the context that is smallest
    when all target blocks lie at the best position; and what leaves so few, in words."""
    if config.strategy == "rasterized":
        quadrant = _Size(grid.size.h // 2, grid.size.w // 2)
        return quadrant.area, quadrant.area, f"a quadrant of {quadrant} patches"
    counts = _drawable_counts(config.target_scale, grid)
    if counts[0] == 0:
        return 0, 0, "an empty target"
    if config.strategy == "random":
        return counts[0], grid.num_patches - counts[-1], f"a target of {counts[-1]} patches"
    targets = _drawable_target_sizes(config, grid)
    smallest = min(target.area for target in targets)
    if config.strategy == "block":
        largest = max(targets, key=lambda target: target.area)
        return smallest, grid.num_patches - largest.area, f"a target block of {largest} patches"

    def best(context: _Size, target: _Size) -> int:
        rows, cols = (max(0, c + t - r) for c, t, r in zip(context, target, grid.reach, strict=True))
        return context.area - rows * cols  # rows and cols that overlap when the two lie at opposite ends of the reach

    contexts = {grid.block_size(count, grid.aspect) for count in _drawable_counts(config.context_scale, grid)}
    context, target = min(product(contexts, targets), key=lambda pair: best(*pair))
    return smallest, best(context, target), f"a context block of {context} patches with target blocks of {target}"
