"""Which patches are seen and which are predicted: the multi-block sampler of I-JEPA (paper, section 3), for whole batches.

A target block is a rectangle of patches; the context is a larger rectangle minus the target blocks. One block size for
the targets and one for the context are drawn per step and shared by all images; positions are drawn per image. All
draws are counter-based, so the masks are a pure function of (seed, step, sample index): the same on any device, at any
world size, in any split of the batch. (The cut of the `official` mode depends, by its definition, on the given batch.)

Block sizes are computed on the host in float64. Everything per image is integer arithmetic on tensors, hence
bit-identical on every device, with no loop over images. Random words: counter (i // 4, domain, sample index, step),
word i % 4, for the i-th word of a stream. In DOMAIN_BLOCK_POSITION words 2 d and 2 d + 1 are top and left of draw d:
draws 0 to M - 1 are the target blocks, the others the attempts at a context block, in order.

Shapes: B images, N patches in raster order, M target blocks, A attempts, H and W rows and columns of the grid.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from itertools import accumulate, pairwise, product
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastjepa.config import MaskConfig, Pair
from fastjepa.errors import ConfigError
from fastjepa.philox import (
    DOMAIN_BLOCK_POSITION,
    DOMAIN_BLOCK_SIZE,
    DOMAIN_BUDGET,
    philox4x32,
    uniform_int,
    unit_interval,
)
from fastjepa_kernels.ragged import Ragged, concat_rows

_ATTEMPTS = 20  # at a context block, before one target block fewer is subtracted from it
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
        """The same masks on `device`; asynchronously, if they lie in pinned memory."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> MaskBatch:
        return self._map(Tensor.pin_memory)

    def _map(self, move: Callable[[Tensor], Tensor]) -> MaskBatch:
        def moved(value: Any) -> Any:
            if isinstance(value, Ragged):
                return replace(value, cu_seqlens=move(value.cu_seqlens))
            return move(value) if isinstance(value, Tensor) else value

        return replace(self, **{f.name: moved(getattr(self, f.name)) for f in fields(self)})


def sample_masks(
    config: MaskConfig, grid_h: int, grid_w: int, *, seed: int, step: int, sample_indices: Tensor
) -> MaskBatch:
    """The masks of one (micro) batch: a pure function of its arguments.

    The lengths are read back to the host, so sample where that costs nothing: on the CPU, in the loader's thread.

    Args:
        config: the mask settings.
        grid_h, grid_w: rows and columns of patches.
        seed: of the run, in [0, 2^64).
        step: optimizer step, in [0, 2^32); all ranks and micro batches of a step share its block sizes.
        sample_indices: int64 [B], B > 0, the global index of each image; its device is that of the masks.

    Raises:
        ValueError: no valid mask exists (`check_grid`), or sample_indices has another shape or dtype.
    """
    _check_grid_once(config, grid_h, grid_w)
    if sample_indices.dtype != torch.int64 or sample_indices.ndim != 1 or len(sample_indices) == 0:
        got = f"{sample_indices.dtype} {list(sample_indices.shape)}"
        raise ValueError(f"sample_indices: got {got}, expected torch.int64 [B] with B > 0")
    grid = _Grid.of(config, grid_h, grid_w)
    words = _Words(seed, step, sample_indices)
    sample = {"multiblock": _multiblock, "block": _block, "random": _random, "rasterized": _rasterized}[config.strategy]
    target_mask, context_mask = sample(config, grid, words)
    if config.mode == "official":
        target_mask, context_mask = _cut_to_minimum(target_mask), _cut_to_minimum(context_mask)
    elif config.mode == "budget":
        order = words.draw(DOMAIN_BUDGET, grid.num_patches)
        context_mask = _random_subset(context_mask, _min_context(config, grid), order)
    return _pack(target_mask, context_mask)


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


class _DrawnSizes(NamedTuple):
    """Of one step."""

    target_count: int
    """Patches of a target, before they are made a block."""
    target: _Size
    context: _Size

    @staticmethod
    def of(config: MaskConfig, grid: _Grid, words: _Words) -> _DrawnSizes:
        draws = philox4x32(np.zeros(1, np.int64), DOMAIN_BLOCK_SIZE, 0, words.step, seed=words.seed)
        u_count, u_aspect, u_context, _ = (float(unit_interval(word)[0]) for word in draws)
        if config.mode == "official":
            u_aspect = u_count
        target_count = int(grid.num_patches * _between(config.target_scale, u_count))
        context_count = int(grid.num_patches * _between(config.context_scale, u_context))
        return _DrawnSizes(
            target_count,
            grid.block_size(target_count, _between(config.target_aspect_ratio, u_aspect)),
            grid.block_size(context_count, grid.aspect),
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


# Masks, on the device: bool [B, M, N] and [B, N], True for target and context patches


class _Words(NamedTuple):
    """The random words of a batch."""

    seed: int
    step: int
    sample_indices: Tensor
    """int64 [B]."""

    @property
    def num_images(self) -> int:
        return len(self.sample_indices)

    def draw(self, domain: int, count: int) -> Tensor:
        """int64 [B, count], uniform in [0, 2^32)."""
        counter = torch.arange(-(-count // 4), device=self.sample_indices.device)
        sample = (self.sample_indices & 0xFFFFFFFF)[:, None]
        words = philox4x32(counter, domain, sample, self.step, seed=self.seed)
        return torch.stack(words, 2).flatten(1)[:, :count]


def _corners(words: Tensor, size: _Size, grid: _Grid) -> tuple[Tensor, Tensor]:
    """Top and left, int64 [B, n] each, of blocks at uniform positions, from words [B, n, 2]."""
    reach = grid.reach
    return uniform_int(words[..., 0], reach.h - size.h + 1), uniform_int(words[..., 1], reach.w - size.w + 1)


def _blocks(top: Tensor, left: Tensor, size: _Size, grid: _Grid) -> Tensor:
    """bool [B, n, H, W] from top and left, [B, n]: True inside the block."""
    row = torch.arange(grid.size.h, device=top.device) - top[..., None]  # [B, n, H]
    col = torch.arange(grid.size.w, device=top.device) - left[..., None]  # [B, n, W]
    inside_rows, inside_cols = (row >= 0) & (row < size.h), (col >= 0) & (col < size.w)
    return inside_rows[..., :, None] & inside_cols[..., None, :]


def _count_inside(masks: Tensor, which: Tensor, top: Tensor, left: Tensor, size: _Size) -> Tensor:
    """How many patches of a mask lie inside a block: four entries of the mask's summed-area table, whose entry (row, col)
    counts the patches above that row and left of that column.

    Args:
        masks: bool [B, K, H, W].
        which: int64 [A], in [0, K): the mask to look at.
        top, left: int64 [B, A], of blocks of that size.

    Returns:
        int32 [B, A].
    """
    table = F.pad(masks, (1, 0, 1, 0)).cumsum(3, dtype=torch.int32).cumsum(2, dtype=torch.int32)  # [B, K, H + 1, W + 1]
    rows, cols = table.shape[2:]
    table = table.flatten(1)
    corner = (which * rows + top) * cols + left  # [B, A]
    down, right = size.h * cols, size.w
    below, above = (table.gather(1, c + right) - table.gather(1, c) for c in (corner + down, corner))
    return below - above


def _multiblock(config: MaskConfig, grid: _Grid, words: _Words) -> tuple[Tensor, Tensor]:
    """Target blocks, and a context block minus the first k of them: the first attempt that leaves enough tokens.

    k is M in attempts 0 to 19, M - 1 in 20 to 39, and so on; 0 in the last 20, which all succeed (`check_grid`).
    """
    sizes = _DrawnSizes.of(config, grid, words)
    num_blocks = config.num_target_blocks
    num_attempts = _ATTEMPTS * (num_blocks + 1)
    corners = words.draw(DOMAIN_BLOCK_POSITION, 2 * (num_blocks + num_attempts)).view(words.num_images, -1, 2)
    targets = _blocks(*_corners(corners[:, :num_blocks], sizes.target, grid), sizes.target, grid)  # [B, M, H, W]
    none = torch.zeros_like(targets[:, 0])
    unions = torch.stack([*accumulate(targets.unbind(1), torch.logical_or, initial=none)], 1)  # [B, M + 1, H, W]

    top, left = _corners(corners[:, num_blocks:], sizes.context, grid)  # [B, A]
    num_subtracted = num_blocks - torch.arange(num_attempts, device=top.device) // _ATTEMPTS  # [A]
    num_left = sizes.context.area - _count_inside(unions, num_subtracted, top, left, sizes.context)
    chosen = (num_left >= _min_context(config, grid)).int().argmax(1, keepdim=True)  # [B, 1]: the first that is valid
    context = _blocks(top.gather(1, chosen), left.gather(1, chosen), sizes.context, grid)[:, 0]
    subtracted = unions[torch.arange(words.num_images, device=top.device), num_subtracted[chosen[:, 0]]]
    return targets.flatten(2), (context & ~subtracted).flatten(1)


def _block(config: MaskConfig, grid: _Grid, words: _Words) -> tuple[Tensor, Tensor]:
    """One target block; the context is all the rest."""
    size = _DrawnSizes.of(config, grid, words).target
    corners = _corners(words.draw(DOMAIN_BLOCK_POSITION, 2)[:, None], size, grid)
    target = _blocks(*corners, size, grid).flatten(2)  # [B, 1, N]
    return target, ~target[:, 0]


def _random(config: MaskConfig, grid: _Grid, words: _Words) -> tuple[Tensor, Tensor]:
    """Random target patches; the context is all the rest."""
    order = words.draw(DOMAIN_BLOCK_POSITION, grid.num_patches)
    target = _random_subset(
        torch.ones_like(order, dtype=torch.bool), _DrawnSizes.of(config, grid, words).target_count, order
    )
    return target[:, None], ~target


def _rasterized(config: MaskConfig, grid: _Grid, words: _Words) -> tuple[Tensor, Tensor]:
    """Four quadrants: a random one is the context, the others are the targets."""
    device = words.sample_indices.device
    lower = torch.arange(grid.size.h, device=device) >= grid.size.h // 2  # [H]
    right = torch.arange(grid.size.w, device=device) >= grid.size.w // 2  # [W]
    quadrant_of_patch = (2 * lower[:, None] + right).flatten()  # [N]
    context = uniform_int(words.draw(DOMAIN_BLOCK_POSITION, 1), 4)  # [B, 1]
    targets = torch.arange(3, device=device)
    targets = targets + (targets >= context)  # [B, 3]: the quadrants without the context
    return quadrant_of_patch == targets[..., None], quadrant_of_patch == context


def _cut_to_minimum(mask: Tensor) -> Tensor:
    """Keep the first patches of every sequence, as many as the shortest of the batch has. mask: bool [..., N]."""
    return mask & (mask.cumsum(-1) <= mask.sum(-1).min())


def _random_subset(mask: Tensor, count: int, words: Tensor) -> Tensor:
    """Keep the `count` patches with the smallest words (the earlier of two equal ones). mask, words: [B, N]."""
    num_patches = mask.shape[1]
    rank = words * num_patches + torch.arange(num_patches, device=mask.device)  # no two equal
    rank = rank.masked_fill(~mask, torch.iinfo(torch.int64).max)
    return mask & (rank <= rank.kthvalue(count, dim=1, keepdim=True).values)


# Packing


def _pack(target_mask: Tensor, context_mask: Tensor) -> MaskBatch:
    """From bool [B, M, N] and [B, N]."""
    num_images, num_blocks, num_patches = target_mask.shape
    union_mask = target_mask.any(1)
    context = Ragged.from_lengths(context_mask.sum(1))
    target = Ragged.from_lengths(target_mask.flatten(0, 1).sum(1))
    image, _, position = target_mask.nonzero(as_tuple=True)
    target_indices = image * num_patches + position

    # The context of image b stands in front of each of its M blocks.
    repeated = Ragged.from_lengths(context.lengths().repeat_interleave(num_blocks))
    shift = context.cu_seqlens[:-1].repeat_interleave(num_blocks) - repeated.cu_seqlens[:-1]  # [B * M]
    context_rows = torch.arange(repeated.total, device=shift.device) + shift.index_select(0, repeated.sequence_ids())
    predictor, repeated_rows, predictor_target_rows = concat_rows(repeated, target)
    predictor_rows = torch.empty(predictor.total, dtype=torch.int64, device=shift.device)
    predictor_rows.scatter_(0, repeated_rows, context_rows).scatter_(0, predictor_target_rows, context.total + position)
    return MaskBatch(
        num_images=num_images,
        num_patches=num_patches,
        context_indices=context_mask.flatten().nonzero()[:, 0],
        context=context,
        target_indices=target_indices,
        target=target,
        union_indices=union_mask.flatten().nonzero()[:, 0],
        union=Ragged.from_lengths(union_mask.sum(1)),
        union_rows=(union_mask.flatten().cumsum(0) - 1).index_select(0, target_indices),
        predictor=predictor,
        predictor_rows=predictor_rows,
        predictor_target_rows=predictor_target_rows,
    )
