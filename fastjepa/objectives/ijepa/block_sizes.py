"""Settings of the masks, and the block sizes that follow from them: drawn per step, checked when settings are read.

Block sizes are computed on the host, in float64, as pure functions of (settings, grid, seed, step).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Literal, NamedTuple

import numpy as np

from fastjepa.config import Pair
from fastjepa.config.settings import require, require_range
from fastjepa.errors import ConfigError
from fastjepa_kernels import MaskRules
from fastjepa_kernels.philox import DOMAIN_BLOCK_SIZE, philox4x32, unit_interval

_LARGEST_UNIFORM = 1 - 2.0**-32


@dataclass(frozen=True, kw_only=True)
class MaskConfig:
    """Which patches are seen and which are predicted (paper, section 3 and Table 6)."""

    mode: Literal["ragged", "official", "budget"] = "ragged"
    """ragged: every sampled token is kept (packed sequences of different lengths). official: the distribution of the
    released code, with its cut to the batch minimum. budget: a uniform random subset of `context_budget` of the context,
    so that all shapes are static but for the size of a step's target blocks, and of their union."""
    strategy: Literal["multiblock", "block", "random", "rasterized"] = "multiblock"
    """multiblock: target blocks, context block minus targets. block: one target block, the rest is context. random: random
    target patches, the rest is context. rasterized: one quadrant is context, the other three are targets."""
    num_target_blocks: int = 4
    """1 for block and random, 3 for rasterized."""
    target_scale: Pair = (0.15, 0.2)
    """Size of a target block as a share of the patches."""
    target_aspect_ratio: Pair = (0.75, 1.5)
    """Height / width of a target block, in patches."""
    context_scale: Pair = (0.85, 1.0)
    """Size of the context block as a share of the patches; it has the grid's aspect ratio."""
    context_budget: float = 0.25
    """budget mode: context tokens as a share of the patches."""
    min_keep: int = 10
    """A context of this many tokens or fewer is drawn again (multiblock). Settings under which every context would be so
    small are refused."""

    def __post_init__(self) -> None:
        blocks = {"multiblock": None, "block": 1, "random": 1, "rasterized": 3}[self.strategy]
        ok = self.num_target_blocks == blocks if blocks else self.num_target_blocks > 0
        expected = f"{blocks} with objective.masks.strategy = {self.strategy}" if blocks else "a positive number"
        require(ok, "objective.masks.num_target_blocks", self.num_target_blocks, expected)
        require_range("objective.masks.target_scale", self.target_scale, 0, 1)
        require_range("objective.masks.target_aspect_ratio", self.target_aspect_ratio, 0, math.inf)
        require_range("objective.masks.context_scale", self.context_scale, 0, 1)
        require(
            0 < self.context_budget < 1,
            "objective.masks.context_budget",
            self.context_budget,
            "a share between 0 and 1",
        )
        require(self.min_keep >= 0, "objective.masks.min_keep", self.min_keep, "0 or more")


@functools.cache
def check_grid(config: MaskConfig, grid_h: int, grid_w: int) -> None:
    """Refuse a grid on which block sizes that can be drawn leave no valid mask, even at the best positions.

    Args:
        config: the mask settings.
        grid_h, grid_w: rows and columns of patches.

    Raises:
        ConfigError: a target can be empty, or every context too small unless a target block is given up.
    """
    grid = _Grid.of(config, grid_h, grid_w)
    where = f"on a grid of {grid.size} patches with objective.masks.mode = {config.mode}"
    targets = "strategy" if config.strategy == "rasterized" else "target_scale"
    remedy = f"use smaller patches, larger images or another objective.masks.{targets}"
    smallest_target, best_context, worst_case = _worst_case(config, grid)
    if smallest_target < 1:
        raise ConfigError(
            f"objective.masks.{targets} = {getattr(config, targets)}: {where} a target can have no patch: {remedy}"
        )
    needed = _min_context(config, grid)
    if best_context < needed:
        key = "context_budget" if needed > config.min_keep + 1 else "min_keep"
        raise ConfigError(
            f"objective.masks.{key} = {getattr(config, key)}: {where} a context needs {needed} tokens or more, but "
            f"{worst_case} leaves {best_context} at best: lower objective.masks.{key}, or {remedy}"
        )


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


def rules_of_step(config: MaskConfig, grid_h: int, grid_w: int, *, seed: int, step: int) -> MaskRules:
    """The block sizes of one step, and what else its masks share."""
    grid = _Grid.of(config, grid_h, grid_w)
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
