"""Which patches of every image are context and which are targets: I-JEPA's masks (paper, section 3), for whole batches.

Every draw is counter-based, so the masks of an image are a pure function of (rules, seed, step, sample index): the same on
any device and in any split of the batch. (The cut of the `official` mode depends, by its definition, on the given batch.)

Random words: counter (i // 4, domain, sample index mod 2^32, step), word i % 4, for the i-th word of a stream (`philox`).

    DOMAIN_BLOCK_POSITION   multiblock, block   words 2 d and 2 d + 1 are top and left of draw d: draws 0 to M - 1 are the
                                                target blocks, the others the attempts at a context block, in order
                            random              word i belongs to patch i: the smallest words are the target
                            rasterized          word 0 chooses the context's quadrant
    DOMAIN_BUDGET           budget mode         word i belongs to patch i: the smallest words of the context are kept

Shapes: B images, N patches in raster order, M target blocks, A attempts, H and W rows and columns of the grid; T_c, T_t,
T_u and T_p tokens in all contexts, targets, unions of targets and predictor sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastjepa_kernels import _backend
from fastjepa_kernels.philox import DOMAIN_BLOCK_POSITION, DOMAIN_BUDGET, philox4x32, uniform_int

_Ints = npt.NDArray[np.int64]
_Bools = npt.NDArray[np.bool_]

ATTEMPTS = 20
"""At a context block, before one target block fewer is subtracted from it."""


@dataclass(frozen=True)
class MaskRules:
    """What the masks of a step have in common.

    Raises:
        ValueError: they leave an image without a target or without a valid context.
    """

    strategy: Literal["multiblock", "block", "random", "rasterized"]
    """multiblock: M target blocks; the context is a block minus the first k of them, the first attempt that leaves
    min_context tokens: k is M in attempts 0 to 19, M - 1 in 20 to 39, ..., 0 in the last 20. block: one target block;
    random: one target of target_count patches anywhere; the context is the rest. rasterized: of the four quadrants a
    random one is the context, the others are the M = 3 targets."""
    mode: Literal["ragged", "official", "budget"]
    """ragged: every token is kept. official: every context keeps its first tokens only, as many as the shortest of the
    batch has, and so does every target. budget: a uniform subset of min_context tokens of every context."""
    grid_h: int
    grid_w: int
    reach_h: int
    """Blocks lie in the first reach_h rows and reach_w columns."""
    reach_w: int
    target_h: int
    """Of a target block, in patches: multiblock and block."""
    target_w: int
    context_h: int
    """Of the context block: multiblock."""
    context_w: int
    target_count: int
    """Patches of a target: random."""
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
        """The numbers of patches of the quadrants, in order of size."""
        top, left = self.grid_h // 2, self.grid_w // 2
        return sorted(h * w for h in (top, self.grid_h - top) for w in (left, self.grid_w - left))

    @property
    def _least_context(self) -> int:
        """The number of tokens that every context can have."""
        return {
            "multiblock": self.context_h * self.context_w,
            "block": self.num_patches - self.target_h * self.target_w,
            "random": self.num_patches - self.target_count,
            "rasterized": self._quadrants[0],
        }[self.strategy]

    @property
    def max_context(self) -> int:
        """The most tokens that the context of an image can have."""
        if self.mode == "budget":
            return self.min_context
        return self._quadrants[-1] if self.strategy == "rasterized" else self._least_context

    @property
    def max_target(self) -> int:
        """The most tokens that the target blocks of an image can have together."""
        return {
            "multiblock": self.num_target_blocks * self.target_h * self.target_w,
            "block": self.target_h * self.target_w,
            "random": self.target_count,
            "rasterized": sum(self._quadrants[1:]),
        }[self.strategy]

    @property
    def max_union(self) -> int:
        """The most patches that the target blocks of an image can cover."""
        return min(self.max_target, self.num_patches)

    @property
    def max_predictor(self) -> int:
        """The most tokens that the predictor sequences of an image can have together."""
        return self.num_target_blocks * self.max_context + self.max_target


class PackedMasks(NamedTuple):
    """The masks of a batch. Indices and rows are int64, in raster order within a sequence; a patch index is flat: image *
    N + patch. cu_seqlens are int32 (`Ragged`).

    Indices and rows have as many entries as `sizes` says, or more, up to B times the `max_...` of the rules: those beyond
    are 0, a valid index. So nobody has to know the numbers on the host before the masks are sampled.
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
    """[T_p] row of each predictor token in cat([context tokens, one row per patch position]): context token t is row t,
    a target token at position j of N is row T_c + j."""
    predictor_cu_seqlens: Tensor
    """[B * M + 1]: sequence b * M + m is the context tokens of image b, then the target tokens of its block m."""
    predictor_target_rows: Tensor
    """[T_t] rows of the target tokens in the packed predictor sequences."""
    sizes: Tensor
    """int64 [2, 4]: T_c, T_t, T_u, T_p; and the longest sequence of each kind."""


def mask_sampling(rules: MaskRules, *, seed: int, step: int, sample_indices: Tensor) -> PackedMasks:
    """The masks of one batch: a pure function of its arguments.

    Args:
        rules: what the masks have in common.
        seed: in [0, 2^64).
        step: in [0, 2^32).
        sample_indices: int64 [B], B > 0: the global index of each image, of which the lower 32 bits count. The masks lie
            on its device.

    Returns:
        The same masks from every implementation. `triton` never waits for the device; `torch` works on the host, and
        returns no entries beyond the true sizes.

    Raises:
        ValueError: an argument out of range, or sizes that the implementation cannot take.
    """
    if sample_indices.dtype != torch.int64 or sample_indices.ndim != 1 or len(sample_indices) == 0:
        got = f"{sample_indices.dtype} {list(sample_indices.shape)}"
        raise ValueError(f"sample_indices: got {got}, expected torch.int64 [B] with B > 0")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed: got {seed}, expected a number in [0, 2^64)")
    if not 0 <= step < 2**32:
        raise ValueError(f"step: got {step}, expected a number in [0, 2^32)")
    if len(sample_indices) * max(rules.max_predictor, rules.num_patches) >= 2**31:
        raise ValueError(
            f"sample_indices: got {len(sample_indices)} images with up to {rules.max_predictor} predictor tokens each,"
            " expected fewer than 2^31 tokens: cu_seqlens are int32"
        )
    if _backend.choose("mask_sampling", sample_indices.device.type, sample_indices.dtype) == "triton":
        from fastjepa_kernels._triton.mask_sampling import mask_sampling_triton

        return mask_sampling_triton(rules, seed, step, sample_indices)
    # On the host with NumPy: the arrays are small, so that the cost is that of a call, which is lowest there.
    words = _Words(seed, step, sample_indices.cpu().numpy())
    sample = {"multiblock": _multiblock, "block": _block, "random": _random, "rasterized": _rasterized}[rules.strategy]
    target_mask, context_mask = sample(rules, words)
    if rules.mode == "official":
        target_mask, context_mask = _cut_to_minimum(target_mask), _cut_to_minimum(context_mask)
    elif rules.mode == "budget":
        order = words.draw(DOMAIN_BUDGET, 0, rules.num_patches)
        context_mask = _random_subset(context_mask, rules.min_context, order)
    return PackedMasks(*(x.to(sample_indices.device) for x in _pack(target_mask, context_mask)))


# On the host: bool [B, M, N] and [B, N], True for target and context patches


class _Words(NamedTuple):
    """The random words of some images."""

    seed: int
    step: int
    sample_indices: _Ints

    def of(self, images: _Ints) -> _Words:
        return self._replace(sample_indices=self.sample_indices[images])

    def draw(self, domain: int, start: int, count: int) -> _Ints:
        """Words `start` to `start + count` - 1 of a stream: [B, count], uniform in [0, 2^32)."""
        first = start // 4
        counter = np.arange(first, -(-(start + count) // 4))
        sample = (self.sample_indices & 0xFFFFFFFF)[:, None]
        words = np.empty((len(sample), len(counter), 4), np.int64)
        for i, word in enumerate(philox4x32(counter, domain, sample, self.step, seed=self.seed)):
            words[..., i] = word
        return words.reshape(len(sample), -1)[:, start - 4 * first :][:, :count]


def _blocks(rules: MaskRules, words: _Ints, h: int, w: int) -> _Bools:
    """[B, n, N]: True inside the h x w block of each draw; words: [B, 2 n], top and left of every draw."""
    row, col = np.divmod(np.arange(rules.num_patches), rules.grid_w)
    tops, lefts = np.arange(rules.reach_h - h + 1)[:, None], np.arange(rules.reach_w - w + 1)[:, None]
    # Tables of all that a draw can choose: to copy whole rows of N is faster than to fill a grid row by row.
    inside_rows = (tops <= row) & (row < tops + h)  # [tops, N]
    inside_cols = (lefts <= col) & (col < lefts + w)  # [lefts, N]
    top, left = uniform_int(words[:, ::2], len(tops)), uniform_int(words[:, 1::2], len(lefts))
    return inside_rows.take(top, 0) & inside_cols.take(left, 0)


def _multiblock(rules: MaskRules, words: _Words) -> tuple[_Bools, _Bools]:
    num_blocks, h, w = rules.num_target_blocks, rules.context_h, rules.context_w
    drawn = words.draw(DOMAIN_BLOCK_POSITION, 0, 2 * num_blocks + 2)
    targets = _blocks(rules, drawn[:, :-2], rules.target_h, rules.target_w)
    context = _blocks(rules, drawn[:, -2:], h, w)[:, 0] & ~targets.any(1)
    # Nearly every image keeps its first attempt, so that all of them are drawn for the few others alone.
    missing = np.flatnonzero(context.sum(1) < rules.min_context)
    for given_up in range(num_blocks + 1):
        if len(missing) == 0:
            break
        start = num_blocks + ATTEMPTS * given_up
        drawn = words.of(missing).draw(DOMAIN_BLOCK_POSITION, 2 * start, 2 * ATTEMPTS)
        union = np.logical_or.reduce(targets[missing, : num_blocks - given_up], axis=1)
        attempts = _blocks(rules, drawn, h, w) & ~union[:, None]  # [missing, A, N]
        valid = attempts.sum(2) >= rules.min_context
        context[missing] = attempts[np.arange(len(missing)), valid.argmax(1)]  # the first valid one
        missing = missing[~valid.any(1)]
    return targets, context


def _block(rules: MaskRules, words: _Words) -> tuple[_Bools, _Bools]:
    target = _blocks(rules, words.draw(DOMAIN_BLOCK_POSITION, 0, 2), rules.target_h, rules.target_w)  # [B, 1, N]
    return target, ~target[:, 0]


def _random(rules: MaskRules, words: _Words) -> tuple[_Bools, _Bools]:
    order = words.draw(DOMAIN_BLOCK_POSITION, 0, rules.num_patches)
    target = _random_subset(np.ones_like(order, bool), rules.target_count, order)
    return target[:, None], ~target


def _rasterized(rules: MaskRules, words: _Words) -> tuple[_Bools, _Bools]:
    lower = np.arange(rules.grid_h) >= rules.grid_h // 2
    right = np.arange(rules.grid_w) >= rules.grid_w // 2
    quadrant_of_patch = (2 * lower[:, None] + right).flatten()  # [N]
    context = uniform_int(words.draw(DOMAIN_BLOCK_POSITION, 0, 1), 4)  # [B, 1]
    targets = np.arange(3) + (np.arange(3) >= context)  # [B, 3]: the quadrants without the context
    return quadrant_of_patch == targets[..., None], quadrant_of_patch == context


def _cut_to_minimum(mask: _Bools) -> _Bools:
    """Keep the first patches of every sequence [..., N], as many as the shortest of the batch has."""
    lengths = mask.sum(-1)
    if lengths.min() == lengths.max():  # as of target blocks
        return mask
    return mask & (mask.cumsum(-1, np.int32) <= lengths.min())


def _random_subset(mask: _Bools, count: int, words: _Ints) -> _Bools:
    """Keep the `count` patches with the smallest words (the earlier of two equal ones). All [B, N]."""
    num_patches = mask.shape[1]
    rank = np.where(mask, words * num_patches + np.arange(num_patches), np.iinfo(np.int64).max)  # no two equal
    return mask & (rank <= np.partition(rank, count - 1, axis=1)[:, count - 1 : count])


class _Sequences(NamedTuple):
    """`Ragged` on the host."""

    cu_seqlens: _Ints
    lengths: _Ints


def _sequences(mask: _Bools) -> tuple[_Ints, _Sequences]:
    """The patches of a mask [..., N], as indices of the flat mask, and its sequences."""
    indices = np.flatnonzero(mask)
    cu_seqlens = indices.searchsorted(np.arange(0, mask.size + 1, mask.shape[-1]))
    return indices, _Sequences(cu_seqlens, cu_seqlens[1:] - cu_seqlens[:-1])


def _pack(target_mask: _Bools, context_mask: _Bools) -> PackedMasks:
    """From [B, M, N] and [B, N]."""
    num_images, num_blocks, num_patches = target_mask.shape
    union_mask = np.logical_or.reduce(target_mask, axis=1)
    context_indices, context = _sequences(context_mask)
    union_indices, union = _sequences(union_mask)
    position, target = _sequences(target_mask)
    # A predictor sequence is the rows of its image's context, and behind them its target tokens.
    context_lengths = context.lengths.repeat(num_blocks)  # [B * M]
    num_context = context_lengths.cumsum()  # [B * M]: context tokens of each predictor sequence and those before it
    predictor = _Sequences(target.cu_seqlens + np.concatenate([[0], num_context]), context_lengths + target.lengths)

    # Sums in place: memory that is new to the process takes longer than they do.
    seq, count = np.arange(num_images * num_blocks), np.arange(predictor.cu_seqlens[-1])
    position -= (seq * num_patches).repeat(target.lengths)
    target_indices = (seq // num_blocks * num_patches).repeat(target.lengths)
    target_indices += position
    predictor_target_rows = num_context.repeat(target.lengths)
    predictor_target_rows += count[: len(position)]
    first = context.cu_seqlens[:-1].repeat(num_blocks) - predictor.cu_seqlens[:-1]
    predictor_rows = first.repeat(predictor.lengths)
    predictor_rows += count
    position += len(context_indices)
    predictor_rows[predictor_target_rows] = position
    kinds = (context, target, union, predictor)
    cu_seqlens = [torch.from_numpy(x.cu_seqlens.astype(np.int32)) for x in kinds]
    sizes = np.array([[x.cu_seqlens[-1] for x in kinds], [x.lengths.max() for x in kinds]])
    return PackedMasks(
        context_indices=torch.from_numpy(context_indices),
        context_cu_seqlens=cu_seqlens[0],
        target_indices=torch.from_numpy(target_indices),
        target_cu_seqlens=cu_seqlens[1],
        union_indices=torch.from_numpy(union_indices),
        union_cu_seqlens=cu_seqlens[2],
        union_rows=torch.from_numpy(union_mask.cumsum().take(target_indices) - 1),
        predictor_rows=torch.from_numpy(predictor_rows),
        predictor_cu_seqlens=cu_seqlens[3],
        predictor_target_rows=torch.from_numpy(predictor_target_rows),
        sizes=torch.from_numpy(sizes),
    )
