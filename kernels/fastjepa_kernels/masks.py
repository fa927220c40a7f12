"""The input and output of mask sampling: the rules of a step's masks, and the packed masks of a batch.

Shapes: B images, N patches in raster order, M target blocks; T_c, T_t, T_u and T_p tokens in all contexts, targets,
unions of targets and predictor sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

ATTEMPTS = 20
"""Draws of a context block before one target block fewer is subtracted from it."""


@dataclass(frozen=True)
class MaskRules:
    """The rules that all masks of a step share.

    Raises:
        ValueError: the rules leave an image without a target or without a valid context.
    """

    strategy: Literal["multiblock", "block", "random", "rasterized"]
    """multiblock: M target blocks; the context is a block minus the first k of them, in the first attempt that leaves
    min_context tokens. k is M in attempts 0 to 19, M - 1 in attempts 20 to 39, ..., 0 in the last 20. block: one target
    block; the context is the rest. random: one target of target_count patches anywhere; the context is the rest.
    rasterized: one of the four quadrants, chosen at random, is the context; the others are the M = 3 targets."""
    mode: Literal["ragged", "official", "budget"]
    """ragged: every token is kept. official: every context keeps only its first tokens, as many as the shortest context of
    the batch has, and every target likewise. budget: every context keeps a uniform random subset of min_context tokens."""
    grid_h: int
    grid_w: int
    reach_h: int
    """Blocks lie within the first reach_h rows and reach_w columns."""
    reach_w: int
    target_h: int
    """Height of a target block in patches (multiblock and block)."""
    target_w: int
    context_h: int
    """Height of the context block in patches (multiblock)."""
    context_w: int
    target_count: int
    """Patches of a target (random)."""
    num_target_blocks: int
    min_context: int

    def __post_init__(self) -> None:
        blocks = {"multiblock": self.num_target_blocks, "block": 1, "random": 1, "rasterized": 3}[self.strategy]
        if self.num_target_blocks != blocks or blocks < 1:
            raise ValueError(
                f"num_target_blocks: got {self.num_target_blocks} with strategy {self.strategy}, expected {max(blocks, 1)}"
            )
        limits = [("reach_h", self.grid_h), ("reach_w", self.grid_w)]
        if self.strategy in ("multiblock", "block"):
            limits += [("target_h", self.reach_h), ("target_w", self.reach_w)]
        if self.strategy == "multiblock":
            limits += [("context_h", self.reach_h), ("context_w", self.reach_w)]
        if self.strategy == "random":
            limits += [("target_count", self.num_patches - 1)]
        limits += [("min_context", self._least_context)]
        for name, limit in limits:
            if not 1 <= getattr(self, name) <= limit:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected a number from 1 to {limit}")

    @property
    def num_patches(self) -> int:
        return self.grid_h * self.grid_w

    @property
    def _quadrants(self) -> list[int]:
        """Patches of each quadrant, the smallest first."""
        top, left = self.grid_h // 2, self.grid_w // 2
        return sorted(h * w for h in (top, self.grid_h - top) for w in (left, self.grid_w - left))

    @property
    def _least_context(self) -> int:
        """Tokens that every context can have."""
        return {
            "multiblock": self.context_h * self.context_w,
            "block": self.num_patches - self.target_h * self.target_w,
            "random": self.num_patches - self.target_count,
            "rasterized": self._quadrants[0],
        }[self.strategy]

    @property
    def max_context(self) -> int:
        """Upper bound of the tokens in the context of an image."""
        if self.mode == "budget":
            return self.min_context
        return self._quadrants[-1] if self.strategy == "rasterized" else self._least_context

    @property
    def max_target(self) -> int:
        """Upper bound of the tokens in all target blocks of an image together."""
        return {
            "multiblock": self.num_target_blocks * self.target_h * self.target_w,
            "block": self.target_h * self.target_w,
            "random": self.target_count,
            "rasterized": sum(self._quadrants[1:]),
        }[self.strategy]

    @property
    def max_union(self) -> int:
        """Upper bound of the patches that the target blocks of an image cover."""
        return min(self.max_target, self.num_patches)

    @property
    def max_predictor(self) -> int:
        """Upper bound of the tokens in all predictor sequences of an image together."""
        return self.num_target_blocks * self.max_context + self.max_target


class PackedMasks(NamedTuple):
    """The masks of a batch. Indices and rows are int64, in raster order within a sequence; a patch index is flat: image *
    N + patch. cu_seqlens are int32 (`Ragged`).

    Indices and rows may have more entries than `sizes` says, up to B times the `max_...` of the rules. The entries beyond
    are 0, which is a valid index. So the host needs no sizes before the masks are sampled.
    """

    context_indices: Tensor
    """[T_c] patch indices of the context tokens."""
    context_cu_seqlens: Tensor
    """[B + 1]: sequence b is the context of image b."""
    target_indices: Tensor
    """[T_t] patch indices of the target tokens."""
    target_cu_seqlens: Tensor
    """[B * M + 1]: sequence b * M + m is block m of image b."""
    union_indices: Tensor
    """[T_u] patch indices of each image's union of target blocks."""
    union_cu_seqlens: Tensor
    """[B + 1]."""
    union_rows: Tensor
    """[T_t] row of each target token in the packed union."""
    predictor_rows: Tensor
    """[T_p] row of each predictor token in cat([context tokens, one row per patch position]): context token t is row t, and
    a target token at position j of N is row T_c + j."""
    predictor_cu_seqlens: Tensor
    """[B * M + 1]: sequence b * M + m is the context tokens of image b, then the target tokens of its block m."""
    predictor_target_rows: Tensor
    """[T_t] rows of the target tokens in the packed predictor sequences."""
    sizes: Tensor
    """int64 [2, 4]: T_c, T_t, T_u, T_p, and below them the length of the longest sequence of each kind."""
