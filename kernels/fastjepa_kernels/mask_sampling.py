"""I-JEPA's masks (paper, section 3) for whole batches: which patches of every image are context and which are targets.

Every draw is counter-based, so the masks of an image are a pure function of (rules, seed, step, sample index): the same on
any device and in any split of the batch. (The cut of the `official` mode depends, by its definition, on the given batch.)

The i-th word of a stream is word i % 4 of counter (i // 4, domain, sample index mod 2^32, step) (`philox`):

    DOMAIN_BLOCK_POSITION   multiblock, block   words 2 d and 2 d + 1 are top and left of draw d: draws 0 to M - 1 are the
                                                target blocks, the others the attempts at a context block, in order
                            random              word i belongs to patch i: the smallest words are the target
                            rasterized          word 0 chooses the context's quadrant
    DOMAIN_BUDGET           budget mode         word i belongs to patch i: the smallest words of the context are kept

Shapes: B images, N patches in raster order, M target blocks, A attempts.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastjepa_kernels.masks import ATTEMPTS, MaskRules, PackedMasks
from fastjepa_kernels.philox import DOMAIN_BLOCK_POSITION, DOMAIN_BUDGET, philox4x32, uniform_int
from fastjepa_kernels.selection import choose

_Ints = npt.NDArray[np.int64]
_Bools = npt.NDArray[np.bool_]


def mask_sampling(rules: MaskRules, *, seed: int, step: int, sample_indices: Tensor) -> PackedMasks:
    """Sample the masks of one batch, as a pure function of the arguments.

    Args:
        rules: the rules that all masks share.
        seed: in [0, 2^64).
        step: in [0, 2^32).
        sample_indices: int64 [B], B > 0, the global index of each image. Only its lower 32 bits count. The masks lie on its
            device.

    Returns:
        The same masks from every implementation. `triton` never waits for the device. `torch` works on the host, and its
        result has no entries beyond the true sizes.

    Raises:
        ValueError: an argument is out of range, or the implementation cannot take such sizes.
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
    if choose("mask_sampling", sample_indices.device.type, sample_indices.dtype) == "triton":
        from fastjepa_kernels.triton_kernels.mask_sampling import mask_sampling_triton

        return mask_sampling_triton(rules, seed, step, sample_indices)
    # NumPy on the host: the arrays are so small that the cost is the number of calls, and NumPy's calls cost least.
    words = _Words(seed, step, sample_indices.cpu().numpy())
    sample = {"multiblock": _multiblock, "block": _block, "random": _random, "rasterized": _rasterized}[rules.strategy]
    target_mask, context_mask = sample(rules, words)
    if rules.mode == "official":
        target_mask, context_mask = _cut_to_minimum(target_mask), _cut_to_minimum(context_mask)
    elif rules.mode == "budget":
        order = words.draw(DOMAIN_BUDGET, 0, rules.num_patches)
        context_mask = _random_subset(context_mask, rules.min_context, order)
    return PackedMasks(*(x.to(sample_indices.device) for x in _pack(target_mask, context_mask)))


# The functions below work on the host, with bool [B, M, N] (True: a target patch) and bool [B, N] (True: a context patch).


class _Words(NamedTuple):
    """The random words of a set of images."""

    seed: int
    step: int
    sample_indices: _Ints

    def of(self, images: _Ints) -> _Words:
        return self._replace(sample_indices=self.sample_indices[images])

    def draw(self, domain: int, start: int, count: int) -> _Ints:
        """Words `start` to `start + count` - 1 of a stream, [B, count], uniform in [0, 2^32)."""
        first = start // 4
        counter = np.arange(first, -(-(start + count) // 4))
        sample = (self.sample_indices & 0xFFFFFFFF)[:, None]
        words = np.empty((len(sample), len(counter), 4), np.int64)
        for i, word in enumerate(philox4x32(counter, domain, sample, self.step, seed=self.seed)):
            words[..., i] = word
        return words.reshape(len(sample), -1)[:, start - 4 * first :][:, :count]


def _blocks(rules: MaskRules, words: _Ints, h: int, w: int) -> _Bools:
    """[B, n, N], True inside the h x w block of each draw; words [B, 2 n] give the top and left of every draw."""
    row, col = np.divmod(np.arange(rules.num_patches), rules.grid_w)
    tops, lefts = np.arange(rules.reach_h - h + 1)[:, None], np.arange(rules.reach_w - w + 1)[:, None]
    # Look up what a draw can choose in tables: copying whole rows of N is faster than filling a grid row by row.
    inside_rows = (tops <= row) & (row < tops + h)  # [tops, N]
    inside_cols = (lefts <= col) & (col < lefts + w)  # [lefts, N]
    top, left = uniform_int(words[:, ::2], len(tops)), uniform_int(words[:, 1::2], len(lefts))
    return inside_rows.take(top, 0) & inside_cols.take(left, 0)


def _multiblock(rules: MaskRules, words: _Words) -> tuple[_Bools, _Bools]:
    num_blocks, h, w = rules.num_target_blocks, rules.context_h, rules.context_w
    drawn = words.draw(DOMAIN_BLOCK_POSITION, 0, 2 * num_blocks + 2)
    targets = _blocks(rules, drawn[:, :-2], rules.target_h, rules.target_w)
    context = _blocks(rules, drawn[:, -2:], h, w)[:, 0] & ~targets.any(1)
    # Nearly every image keeps its first attempt, so the other attempts are drawn only for the few images that do not.
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
    if lengths.min() == lengths.max():  # always so for target blocks
        return mask
    return mask & (mask.cumsum(-1, np.int32) <= lengths.min())


def _random_subset(mask: _Bools, count: int, words: _Ints) -> _Bools:
    """Keep the `count` patches with the smallest words, and the earlier patch where two words are equal. All [B, N]."""
    num_patches = mask.shape[1]
    rank = np.where(mask, words * num_patches + np.arange(num_patches), np.iinfo(np.int64).max)  # no two equal
    return mask & (rank <= np.partition(rank, count - 1, axis=1)[:, count - 1 : count])


class _Sequences(NamedTuple):
    """The lengths of packed sequences on the host, as `Ragged` has them on a device."""

    cu_seqlens: _Ints
    lengths: _Ints


def _sequences(mask: _Bools) -> tuple[_Ints, _Sequences]:
    """The patches of a mask [..., N], as indices of the flat mask, and its sequences."""
    indices = np.flatnonzero(mask)
    cu_seqlens = indices.searchsorted(np.arange(0, mask.size + 1, mask.shape[-1]))
    return indices, _Sequences(cu_seqlens, cu_seqlens[1:] - cu_seqlens[:-1])


def _pack(target_mask: _Bools, context_mask: _Bools) -> PackedMasks:
    """Pack masks [B, M, N] and [B, N]."""
    num_images, num_blocks, num_patches = target_mask.shape
    union_mask = np.logical_or.reduce(target_mask, axis=1)
    context_indices, context = _sequences(context_mask)
    union_indices, union = _sequences(union_mask)
    position, target = _sequences(target_mask)
    # A predictor sequence is the rows of its image's context, followed by its target tokens.
    context_lengths = context.lengths.repeat(num_blocks)  # [B * M]
    num_context = context_lengths.cumsum()  # [B * M]: context tokens in each predictor sequence and all before it
    predictor = _Sequences(target.cu_seqlens + np.concatenate([[0], num_context]), context_lengths + target.lengths)

    # Add in place: memory that is new to the process costs more time than the sums.
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
