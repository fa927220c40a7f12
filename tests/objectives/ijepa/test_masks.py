"""The mask sampler: equal to a plain implementation in every number and in distribution, and packed as documented.

The statistical tests are two-sample tests of independent draws at level 0.001 (chi-square of homogeneity, or
Kolmogorov-Smirnov, which is conservative on counts). Their seeds are fixed, so a test passes always or never.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from fastjepa.objectives.ijepa.block_sizes import MaskConfig
from fastjepa.objectives.ijepa.masks import MaskBatch, sample_masks
from fastjepa_kernels.ragged import Ragged
from fastjepa_kernels.reference import ImageMasks, cut_masks_reference
from tests.support.plain_masks import (
    NUM_TARGET_BLOCKS,
    is_accepted,
    plain_batch,
    plain_sizes,
    random_step,
    three_uniforms,
)

LEVEL = 0.001


def split(values: torch.Tensor, ragged: Ragged) -> list[list[int]]:
    assert len(values) == ragged.total
    return [part.tolist() for part in values.split(ragged.lengths().tolist())]


def images_of(masks: MaskBatch) -> list[ImageMasks]:
    num_blocks = masks.target_lengths.num_seqs // masks.num_images
    contexts = split(masks.context_indices % masks.num_patches, masks.context_lengths)
    targets = split(masks.target_indices % masks.num_patches, masks.target_lengths)
    return [ImageMasks(targets[i * num_blocks : (i + 1) * num_blocks], context) for i, context in enumerate(contexts)]


def sample(
    config: MaskConfig, h: int, w: int, *, num_images: int = 1, step: int = 0, seed: int = 0
) -> list[ImageMasks]:
    return images_of(sample_masks(config, h, w, seed=seed, step=step, sample_indices=torch.arange(num_images)))


def overlap(image: ImageMasks) -> int:
    """The number of context tokens that are targets too: more than 0 only where a target block was given up."""
    return len(set(image.context) & set().union(*image.targets))


def hard_to_mask(mode: Any) -> MaskConfig:
    """Settings with which most contexts on a 7x8 grid are too small."""
    return MaskConfig(
        mode=mode, min_keep=18, target_scale=(0.2, 0.2), target_aspect_ratio=(1.0, 1.0), context_scale=(0.8, 0.8)
    )


@st.composite
def settings_of_masks(draw: st.DrawFn) -> tuple[MaskConfig, int, int]:
    strategy: Any = draw(st.sampled_from(["multiblock", "multiblock", "block", "random", "rasterized"]))
    mode: Any = draw(st.sampled_from(["ragged", "official", "budget"]))
    first, second = (draw(st.floats(0.08, 0.5)) for _ in range(2))
    config = MaskConfig(
        mode=mode,
        strategy=strategy,
        num_target_blocks=NUM_TARGET_BLOCKS.get(strategy) or draw(st.integers(1, 5)),
        target_scale=(min(first, second), max(first, second)),
        target_aspect_ratio=draw(st.sampled_from([(0.75, 1.5), (0.3, 0.6), (1.0, 1.0)])),
        context_scale=draw(st.sampled_from([(0.85, 1.0), (0.5, 0.9), (1.0, 1.0)])),
        context_budget=draw(st.floats(0.05, 0.4)),
        min_keep=draw(st.integers(0, 12)),
    )
    h, w = draw(st.integers(2, 9)), draw(st.integers(2, 9))
    assume(is_accepted(config, h, w))
    return config, h, w


sample_indices = st.lists(st.integers(0, 2**40), min_size=1, max_size=5)
cheap = settings(max_examples=100, deadline=None, derandomize=True)


@cheap
@given(settings_of_masks(), st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1), sample_indices)
def test_masks_equal_the_plain_implementation(
    setting: tuple[MaskConfig, int, int], seed: int, step: int, ids: list[int]
) -> None:
    """Both compute from the same random words, and agree whatever the settings."""
    config, h, w = setting
    masks = sample_masks(config, h, w, seed=seed, step=step, sample_indices=torch.tensor(ids))
    assert images_of(masks) == plain_batch(config, h, w, ids, step, seed)


@pytest.mark.parametrize("mode", ["ragged", "official", "budget"])
def test_redrawn_contexts_equal_the_plain_implementation(mode: Any) -> None:
    """Most contexts are invalid here, so that target blocks are given up after 20 attempts each."""
    config = hard_to_mask(mode)
    images = sample(config, 7, 8, num_images=200)
    assert images == plain_batch(config, 7, 8, [*range(200)])
    assert sum(overlap(image) > 0 for image in images) > 20


@cheap
@given(settings_of_masks(), sample_indices)
def test_packed_arrays_agree_with_lists_of_patches(setting: tuple[MaskConfig, int, int], ids: list[int]) -> None:
    """The test rebuilds every array from the lists of context and target patches, sequence by sequence."""
    config, h, w = setting
    masks = sample_masks(config, h, w, seed=0, step=0, sample_indices=torch.tensor(ids))
    n, m = h * w, config.num_target_blocks
    assert (masks.num_images, masks.num_patches) == (len(ids), n)
    assert (masks.context_lengths.num_seqs, masks.target_lengths.num_seqs, masks.predictor_lengths.num_seqs) == (
        len(ids),
        *[len(ids) * m] * 2,
    )
    contexts, targets = (
        split(masks.context_indices, masks.context_lengths),
        split(masks.target_indices, masks.target_lengths),
    )
    unions, union_indices = split(masks.union_indices, masks.union_lengths), masks.union_indices.tolist()
    predictor_rows = split(masks.predictor_rows, masks.predictor_lengths)
    union_rows, target_rows = (
        split(rows, masks.target_lengths) for rows in (masks.union_rows, masks.predictor_target_rows)
    )
    context_start = predictor_start = 0
    for b, context in enumerate(contexts):
        assert len(context) > config.min_keep
        assert all(i // n == b for i in context)
        own = range(b * m, (b + 1) * m)
        assert unions[b] == sorted(set().union(*(targets[s] for s in own)))
        for s in own:
            assert targets[s]
            assert targets[s] == sorted({i for i in targets[s] if i // n == b})
            assert [union_indices[row] for row in union_rows[s]] == targets[s]
            context_rows = [*range(context_start, context_start + len(context))]
            assert predictor_rows[s] == context_rows + [masks.context_lengths.total + i % n for i in targets[s]]
            predictor_start += len(context)
            assert target_rows[s] == [*range(predictor_start, predictor_start + len(targets[s]))]
            predictor_start += len(targets[s])
        assert context == sorted(set(context))
        context_start += len(context)
    for ragged in (masks.context_lengths, masks.target_lengths, masks.union_lengths, masks.predictor_lengths):
        assert ragged.cu_seqlens.dtype == torch.int32
        assert ragged.max_seqlen >= int(ragged.lengths().max())


def test_masks_of_two_samples_are_those_worked_out_by_hand() -> None:
    """On a 4x4 grid, 2x2 targets have 3 x 3 positions and 3x3 contexts 2 x 2."""
    config = MaskConfig(
        num_target_blocks=1,
        target_scale=(0.25, 0.25),
        target_aspect_ratio=(1, 1),
        context_scale=(0.6, 0.6),
        min_keep=6,
    )
    # The words of sample 0, divided by 2^32, are 0.300 0.283 | 0.052 0.992: target at (0, 0), context at (0, 1).
    # Those of sample 3 are 0.604 0.059 | 0.732 0.627: target at (1, 0), context at (1, 1).
    masks = sample_masks(config, 4, 4, seed=0, step=0, sample_indices=torch.tensor([0, 3]))
    assert masks.target_indices.tolist() == [0, 1, 4, 5, 20, 21, 24, 25]
    assert masks.context_indices.tolist() == [2, 3, 6, 7, 9, 10, 11, 22, 23, 26, 27, 29, 30, 31]
    assert masks.context_lengths.cu_seqlens.tolist() == [0, 7, 14]
    assert masks.predictor_lengths.cu_seqlens.tolist() == [0, 11, 22]
    assert masks.predictor_rows.tolist() == [*range(7), 14, 15, 18, 19, *range(7, 14), 18, 19, 22, 23]
    assert masks.predictor_target_rows.tolist() == [7, 8, 9, 10, 18, 19, 20, 21]
    assert masks.union_rows.tolist() == [*range(8)]


@pytest.mark.parametrize("mode", ["ragged", "budget"])
@pytest.mark.parametrize("strategy", ["multiblock", "block", "random", "rasterized"])
def test_masks_do_not_depend_on_the_batch(mode: Any, strategy: Any) -> None:
    """An image has the same masks in any split and order of the batch, and others with another step or seed."""
    config = MaskConfig(mode=mode, strategy=strategy, num_target_blocks=NUM_TARGET_BLOCKS.get(strategy, 4))
    ids = torch.tensor([5, 0, 2**33 + 1, 7, 123_456_789, 3, 8, 1, 2, 4])

    def masks_of(ids: torch.Tensor, seed: int = 1, step: int = 2) -> list[ImageMasks]:
        return images_of(sample_masks(config, 14, 14, seed=seed, step=step, sample_indices=ids))

    whole = masks_of(ids)
    assert whole == [image for part in ids.split([3, 1, 6]) for image in masks_of(part)]
    order = torch.tensor([9, 3, 1, 0, 2, 8, 7, 6, 5, 4])
    assert [whole[i] for i in order] == masks_of(ids[order])
    assert whole != masks_of(ids, step=3)
    assert whole != masks_of(ids, seed=2)


def test_block_sizes_are_shared_by_a_step_and_differ_between_steps() -> None:
    def sizes(step: int, first: int) -> set[tuple[int, int]]:
        images = images_of(
            sample_masks(MaskConfig(), 14, 14, seed=0, step=step, sample_indices=torch.arange(first, first + 9))
        )
        return {box(target, 14)[:2] for image in images for target in image.targets}

    assert all(len(sizes(step, 0)) == 1 and sizes(step, 0) == sizes(step, 1000) for step in range(5))
    assert len(set.union(*(sizes(step, 0) for step in range(20)))) > 3


# Distribution


def box(block: list[int], w: int) -> tuple[int, int, int, int]:
    """Height, width, top and left of a rectangle of patches on a grid of w columns."""
    rows, cols = [p // w for p in block], [p % w for p in block]
    size = max(rows) - min(rows) + 1, max(cols) - min(cols) + 1
    assert size[0] * size[1] == len(block)
    return *size, min(rows), min(cols)


def p_value(ours: list[Any], theirs: list[Any]) -> float:
    """The p-value of a chi-square test of homogeneity; categories with fewer than 10 observations in all are pooled."""
    a, b = Counter[Hashable](ours), Counter[Hashable](theirs)
    frequent = [key for key in a.keys() | b.keys() if a[key] + b[key] >= 10]
    table = np.array([[c[key] for key in frequent] + [c.total() - sum(c[key] for key in frequent)] for c in (a, b)])
    table = table[:, table.sum(0) > 0]
    assert table.shape[1] > 1, "nothing to compare"
    return float(stats.chi2_contingency(table).pvalue)


@pytest.mark.parametrize(("mode", "grid"), [("official", (14, 14)), ("ragged", (14, 14)), ("ragged", (8, 12))])
def test_steps_are_distributed_as_in_the_plain_implementation(mode: Any, grid: tuple[int, int]) -> None:
    """Compares block sizes, positions and context lengths over 400 steps of one image, so that nothing is cut."""
    config, rng = MaskConfig(mode=mode), np.random.default_rng(1)
    ours = [sample(config, *grid, step=step)[0] for step in range(400)]
    theirs = [random_step(config, *grid, 1, rng)[0] for _ in range(400)]
    boxes = [[box(image.targets[0], grid[1]) for image in images] for images in (ours, theirs)]
    for part in (slice(0, 2), slice(0, 4, 2), slice(1, 4, 2)):  # (height, width), (height, top), (width, left)
        assert p_value(*([b[part] for b in side] for side in boxes)) > LEVEL
    counts = [[len(image.context) for image in images] for images in (ours, theirs)]
    assert stats.ks_2samp(*counts).pvalue > LEVEL


def test_official_cut_is_distributed_as_in_the_plain_implementation() -> None:
    """Compares the context length that batches of 8 images are cut to, over 250 steps."""
    config, rng = MaskConfig(mode="official"), np.random.default_rng(2)
    cut = [len(sample(config, 14, 14, num_images=8, step=step)[0].context) for step in range(250)]
    plain = [random_step(config, 14, 14, 8, rng) for _ in range(250)]
    assert stats.ks_2samp(cut, [len(cut_masks_reference(images)[0].context) for images in plain]).pvalue > LEVEL
    assert stats.ks_2samp(cut, [len(images[0].context) for images in plain]).pvalue < LEVEL  # the test sees the cut


@pytest.mark.parametrize("mode", ["official", "ragged", "budget"])
def test_contexts_are_redrawn_as_in_the_plain_implementation(mode: Any) -> None:
    """Compares context lengths and overlaps per image where most contexts are invalid and target blocks are given up."""
    config = hard_to_mask(mode)
    # In official mode a call has one image, because more would be cut to the shortest context.
    calls, size = (300, 1) if mode == "official" else (1, 2000)
    ours = [image for step in range(calls) for image in sample(config, 7, 8, num_images=size, step=step)]
    theirs = random_step(config, 7, 8, calls * size, np.random.default_rng(3))
    pairs = [[(len(image.context), overlap(image)) for image in images] for images in (ours, theirs)]
    share = sum(shared > 0 for _, shared in pairs[0]) / len(pairs[0])
    assert 0.1 < share < 0.9, "both sides of the rule must occur"
    assert p_value(*pairs) > LEVEL


def test_the_chi_square_test_tells_apart_the_block_sizes_of_two_modes() -> None:
    """Negative control: official mode draws scale and aspect from one number, ragged mode from two."""
    rng = np.random.default_rng(4)
    modes: list[Any] = ["official", "ragged"]
    sizes = [
        [plain_sizes(MaskConfig(mode=mode), 14, 14, three_uniforms(rng)).target for _ in range(700)] for mode in modes
    ]
    assert p_value(*sizes) < LEVEL


@pytest.mark.parametrize("mode", ["ragged", "official"])
def test_last_row_and_column_are_reached_except_in_official_mode(mode: Any) -> None:
    config, ids = MaskConfig(mode=mode), torch.arange(200)
    steps = [sample_masks(config, 6, 9, seed=0, step=step, sample_indices=ids) for step in range(4)]
    for name in ("context_indices", "target_indices"):
        patches = torch.cat([getattr(masks, name) % 54 for masks in steps])
        reached = 5 if mode == "official" else 6, 8 if mode == "official" else 9
        assert (patches // 9).unique().tolist() == [*range(reached[0])]
        assert (patches % 9).unique().tolist() == [*range(reached[1])]


def test_budget_keeps_a_uniform_subset_of_fixed_size() -> None:
    """The context is 2 of the 4 tokens of a quadrant: 4 x 6 equally likely subsets (chi-square, 23 degrees of freedom)."""
    config = MaskConfig(mode="budget", strategy="rasterized", num_target_blocks=3, context_budget=0.125, min_keep=0)
    counts = Counter(tuple(image.context) for image in sample(config, 4, 4, num_images=6000))
    assert {len(subset) for subset in counts} == {2}
    assert len(counts) == 24
    assert stats.chisquare([*counts.values()]).pvalue > LEVEL


@pytest.mark.parametrize(("budget", "min_keep", "kept"), [(0.25, 10, 49), (0.1, 24, 25)])
def test_budget_keeps_the_larger_of_context_budget_and_min_keep(budget: float, min_keep: int, kept: int) -> None:
    config = MaskConfig(mode="budget", context_budget=budget, min_keep=min_keep)
    masks = sample_masks(config, 14, 14, seed=0, step=0, sample_indices=torch.arange(64))
    assert masks.context_lengths.lengths().unique().tolist() == [kept]


def test_random_targets_are_uniform_over_all_subsets() -> None:
    config = MaskConfig(strategy="random", num_target_blocks=1, target_scale=(0.3, 0.3), min_keep=0)
    counts = Counter(tuple(image.targets[0]) for image in sample(config, 2, 5, num_images=6000))
    assert len(counts) == math.comb(10, 3)
    assert stats.chisquare([*counts.values()]).pvalue > LEVEL


@pytest.mark.parametrize("bad", [torch.arange(0), torch.arange(3).int(), torch.arange(4).view(2, 2)])
def test_bad_sample_indices_are_refused(bad: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="sample_indices: got torch"):
        sample_masks(MaskConfig(), 14, 14, seed=0, step=0, sample_indices=bad)


def test_to_moves_every_tensor_and_keeps_the_rest() -> None:
    masks = sample_masks(MaskConfig(), 14, 14, seed=0, step=0, sample_indices=torch.arange(2))
    moved = masks.to(torch.device("meta"))
    for name, value in vars(masks).items():
        other = getattr(moved, name)
        if isinstance(value, Ragged):
            assert (other.max_seqlen, other.total) == (value.max_seqlen, value.total)
            value, other = value.cu_seqlens, other.cu_seqlens
        if isinstance(value, torch.Tensor):
            assert other.device.type == "meta"
            assert (other.shape, other.dtype) == (value.shape, value.dtype)
        else:
            assert other == value


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["ragged", "official", "budget"])
def test_masks_on_a_gpu_are_those_of_the_cpu(mode: Any) -> None:
    ids = torch.arange(16)
    cpu, gpu = (
        sample_masks(MaskConfig(mode=mode), 14, 14, seed=0, step=3, sample_indices=i) for i in (ids, ids.cuda())
    )
    for name, value in vars(cpu).items():
        other = getattr(gpu, name)
        if isinstance(value, Ragged):
            assert (other.max_seqlen, other.total) == (value.max_seqlen, value.total)
            value, other = value.cu_seqlens, other.cu_seqlens
        if isinstance(value, torch.Tensor):
            assert other.is_cuda
            assert torch.equal(value, other.cpu())
        else:
            assert other == value
