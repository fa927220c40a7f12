"""The mask sampler: equal to a plain loop over images, in every number and in distribution; well packed; a pure function.

The statistical tests are two-sample tests at level 0.001 (chi-square of homogeneity, or Kolmogorov-Smirnov, which is
conservative on counts) of independent draws, with fixed seeds: they pass or fail for good.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from fastjepa.objectives.ijepa.block_sizes import MaskConfig, check_grid
from fastjepa.objectives.ijepa.masks import MaskBatch, sample_masks
from fastjepa_kernels import MaskRules
from fastjepa_kernels.philox import DOMAIN_BLOCK_POSITION, DOMAIN_BLOCK_SIZE, DOMAIN_BUDGET, philox4x32
from fastjepa_kernels.ragged import Ragged
from fastjepa_kernels.reference import (
    ImageMasks,
    cut_masks_reference,
    image_masks_reference,
    mask_words_reference,
)

LEVEL = 0.001
BLOCKS = {"block": 1, "random": 1, "rasterized": 3}
Word = Callable[[], int]


class Sizes(NamedTuple):
    target_count: int
    target: tuple[int, int]
    context: tuple[int, int]


# The plain loop: block sizes by the text of the papers and of the issue; one image at a time, by the kernels' plain twin.


def loop_sizes(config: MaskConfig, h: int, w: int, u: tuple[float, float, float]) -> Sizes:
    """Block sizes from three uniform numbers: of the target's scale, of its aspect, of the context's scale."""
    official = config.mode == "official"
    limit_h, limit_w = (h - 1, w - 1) if official else (h, w)

    def size(count: int, aspect: float) -> tuple[int, int]:
        block_h, block_w = round(math.sqrt(count * aspect)), round(math.sqrt(count / aspect))
        return min(max(block_h, 1), limit_h), min(max(block_w, 1), limit_w)

    (s0, s1), (a0, a1), (c0, c1) = config.target_scale, config.target_aspect_ratio, config.context_scale
    count = math.floor(h * w * (s0 + u[0] * (s1 - s0)))
    aspect = a0 + (u[0] if official else u[1]) * (a1 - a0)
    return Sizes(count, size(count, aspect), size(math.floor(h * w * (c0 + u[2] * (c1 - c0))), h / w))


def loop_rules(config: MaskConfig, h: int, w: int, sizes: Sizes) -> MaskRules:
    needed = config.min_keep + 1
    if config.mode == "budget":
        needed = max(needed, math.floor(config.context_budget * h * w))
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
        min_context=needed,
    )


def numpy_words(rng: np.random.Generator) -> Word:
    return lambda: int(rng.integers(2**32))


def uniforms(rng: np.random.Generator) -> tuple[float, float, float]:
    a, b, c = rng.random(3).tolist()
    return a, b, c


# Reading a MaskBatch


def split(values: torch.Tensor, ragged: Ragged) -> list[list[int]]:
    assert len(values) == ragged.total
    return [part.tolist() for part in values.split(ragged.lengths().tolist())]


def images_of(masks: MaskBatch) -> list[ImageMasks]:
    num_blocks = masks.target.num_seqs // masks.num_images
    contexts = split(masks.context_indices % masks.num_patches, masks.context)
    targets = split(masks.target_indices % masks.num_patches, masks.target)
    return [ImageMasks(targets[i * num_blocks : (i + 1) * num_blocks], context) for i, context in enumerate(contexts)]


def sample(
    config: MaskConfig, h: int, w: int, *, num_images: int = 1, step: int = 0, seed: int = 0
) -> list[ImageMasks]:
    return images_of(sample_masks(config, h, w, seed=seed, step=step, sample_indices=torch.arange(num_images)))


def overlap(image: ImageMasks) -> int:
    """Context tokens that are targets too: there are some only where a target block was given up."""
    return len(set(image.context) & set().union(*image.targets))


def hard_to_mask(mode: Any) -> MaskConfig:
    """For a 7x8 grid: most contexts are too small."""
    return MaskConfig(
        mode=mode, min_keep=18, target_scale=(0.2, 0.2), target_aspect_ratio=(1.0, 1.0), context_scale=(0.8, 0.8)
    )


def accepted(config: MaskConfig, h: int, w: int) -> bool:
    try:
        check_grid(config, h, w)
    except ValueError:
        return False
    return True


@st.composite
def settings_of_masks(draw: st.DrawFn) -> tuple[MaskConfig, int, int]:
    strategy: Any = draw(st.sampled_from(["multiblock", "multiblock", "block", "random", "rasterized"]))
    mode: Any = draw(st.sampled_from(["ragged", "official", "budget"]))
    first, second = (draw(st.floats(0.08, 0.5)) for _ in range(2))
    config = MaskConfig(
        mode=mode,
        strategy=strategy,
        num_target_blocks=BLOCKS.get(strategy) or draw(st.integers(1, 5)),
        target_scale=(min(first, second), max(first, second)),
        target_aspect_ratio=draw(st.sampled_from([(0.75, 1.5), (0.3, 0.6), (1.0, 1.0)])),
        context_scale=draw(st.sampled_from([(0.85, 1.0), (0.5, 0.9), (1.0, 1.0)])),
        context_budget=draw(st.floats(0.05, 0.4)),
        min_keep=draw(st.integers(0, 12)),
    )
    h, w = draw(st.integers(2, 9)), draw(st.integers(2, 9))
    assume(accepted(config, h, w))
    return config, h, w


indices = st.lists(st.integers(0, 2**40), min_size=1, max_size=5)
cheap = settings(max_examples=100, deadline=None, derandomize=True)


def loop_batch(config: MaskConfig, h: int, w: int, ids: list[int], step: int = 0, seed: int = 0) -> list[ImageMasks]:
    """The plain loop, fed with the random words that the sampler uses."""
    words = philox4x32(np.zeros(1, np.int64), DOMAIN_BLOCK_SIZE, 0, step, seed=seed)
    u = [int(word[0]) / 2**32 for word in words]
    sizes = loop_sizes(config, h, w, (u[0], u[1], u[2]))
    streams = [[mask_words_reference(d, i, step, seed) for d in (DOMAIN_BLOCK_POSITION, DOMAIN_BUDGET)] for i in ids]
    images = [image_masks_reference(loop_rules(config, h, w, sizes), *stream) for stream in streams]
    return cut_masks_reference(images) if config.mode == "official" else images


@cheap
@given(settings_of_masks(), st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1), indices)
def test_masks_equal_the_plain_loop(setting: tuple[MaskConfig, int, int], seed: int, step: int, ids: list[int]) -> None:
    """Fed with the same random words, the loop yields the same masks, whatever the settings."""
    config, h, w = setting
    masks = sample_masks(config, h, w, seed=seed, step=step, sample_indices=torch.tensor(ids))
    assert images_of(masks) == loop_batch(config, h, w, ids, step, seed)


@pytest.mark.parametrize("mode", ["ragged", "official", "budget"])
def test_redrawn_contexts_equal_the_plain_loop(mode: Any) -> None:
    """The same where most contexts are invalid, so that target blocks are given up after 20 attempts each."""
    config = hard_to_mask(mode)
    images = sample(config, 7, 8, num_images=200)
    assert images == loop_batch(config, 7, 8, [*range(200)])
    assert sum(overlap(image) > 0 for image in images) > 20


@cheap
@given(settings_of_masks(), indices)
def test_packing_is_consistent(setting: tuple[MaskConfig, int, int], ids: list[int]) -> None:
    """Every array agrees with the lists of context and target patches, rebuilt here sequence by sequence."""
    config, h, w = setting
    masks = sample_masks(config, h, w, seed=0, step=0, sample_indices=torch.tensor(ids))
    n, m = h * w, config.num_target_blocks
    assert (masks.num_images, masks.num_patches) == (len(ids), n)
    assert (masks.context.num_seqs, masks.target.num_seqs, masks.predictor.num_seqs) == (len(ids), *[len(ids) * m] * 2)
    contexts, targets = split(masks.context_indices, masks.context), split(masks.target_indices, masks.target)
    unions, union_indices = split(masks.union_indices, masks.union), masks.union_indices.tolist()
    predictor_rows = split(masks.predictor_rows, masks.predictor)
    union_rows, target_rows = (split(rows, masks.target) for rows in (masks.union_rows, masks.predictor_target_rows))
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
            assert predictor_rows[s] == context_rows + [masks.context.total + i % n for i in targets[s]]
            predictor_start += len(context)
            assert target_rows[s] == [*range(predictor_start, predictor_start + len(targets[s]))]
            predictor_start += len(targets[s])
        assert context == sorted(set(context))
        context_start += len(context)
    for ragged in (masks.context, masks.target, masks.union, masks.predictor):
        assert ragged.cu_seqlens.dtype == torch.int32
        assert ragged.max_seqlen >= int(ragged.lengths().max())


def test_golden_masks() -> None:
    """Small enough to check by hand: 2x2 targets in 3 x 3 positions, 3x3 contexts in 2 x 2, on a 4x4 grid."""
    config = MaskConfig(
        num_target_blocks=1,
        target_scale=(0.25, 0.25),
        target_aspect_ratio=(1, 1),
        context_scale=(0.6, 0.6),
        min_keep=6,
    )
    # Words / 2^32 of sample 0: 0.300 0.283 | 0.052 0.992, so target at (0, 0), context at (0, 1);
    # of sample 3: 0.604 0.059 | 0.732 0.627, so target at (1, 0), context at (1, 1).
    masks = sample_masks(config, 4, 4, seed=0, step=0, sample_indices=torch.tensor([0, 3]))
    assert masks.target_indices.tolist() == [0, 1, 4, 5, 20, 21, 24, 25]
    assert masks.context_indices.tolist() == [2, 3, 6, 7, 9, 10, 11, 22, 23, 26, 27, 29, 30, 31]
    assert masks.context.cu_seqlens.tolist() == [0, 7, 14]
    assert masks.predictor.cu_seqlens.tolist() == [0, 11, 22]
    assert masks.predictor_rows.tolist() == [*range(7), 14, 15, 18, 19, *range(7, 14), 18, 19, 22, 23]
    assert masks.predictor_target_rows.tolist() == [7, 8, 9, 10, 18, 19, 20, 21]
    assert masks.union_rows.tolist() == [*range(8)]


@pytest.mark.parametrize("mode", ["ragged", "budget"])
@pytest.mark.parametrize("strategy", ["multiblock", "block", "random", "rasterized"])
def test_masks_do_not_depend_on_the_batch(mode: Any, strategy: Any) -> None:
    """Any split and order of the images yields the same masks; another step or seed yields others."""
    config = MaskConfig(mode=mode, strategy=strategy, num_target_blocks=BLOCKS.get(strategy, 4))
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
    """Height, width, top and left of a rectangle of patches."""
    rows, cols = [p // w for p in block], [p % w for p in block]
    size = max(rows) - min(rows) + 1, max(cols) - min(cols) + 1
    assert size[0] * size[1] == len(block)
    return *size, min(rows), min(cols)


def p_value(ours: list[Any], theirs: list[Any]) -> float:
    """Chi-square test of homogeneity; categories with fewer than 10 observations in all are pooled."""
    a, b = Counter[Hashable](ours), Counter[Hashable](theirs)
    frequent = [key for key in a.keys() | b.keys() if a[key] + b[key] >= 10]
    table = np.array([[c[key] for key in frequent] + [c.total() - sum(c[key] for key in frequent)] for c in (a, b)])
    table = table[:, table.sum(0) > 0]
    assert table.shape[1] > 1, "nothing to compare"
    return float(stats.chi2_contingency(table).pvalue)


def loop_step(config: MaskConfig, h: int, w: int, num_images: int, rng: np.random.Generator) -> list[ImageMasks]:
    rules, word = loop_rules(config, h, w, loop_sizes(config, h, w, uniforms(rng))), numpy_words(rng)
    return [image_masks_reference(rules, word, word) for _ in range(num_images)]


@pytest.mark.parametrize(("mode", "grid"), [("official", (14, 14)), ("ragged", (14, 14)), ("ragged", (8, 12))])
def test_steps_are_distributed_as_in_the_plain_loop(mode: Any, grid: tuple[int, int]) -> None:
    """Block sizes, positions and context counts over 400 steps of one image (one image: nothing is cut)."""
    config, rng = MaskConfig(mode=mode), np.random.default_rng(1)
    ours = [sample(config, *grid, step=step)[0] for step in range(400)]
    theirs = [loop_step(config, *grid, 1, rng)[0] for _ in range(400)]
    boxes = [[box(image.targets[0], grid[1]) for image in images] for images in (ours, theirs)]
    for part in (slice(0, 2), slice(0, 4, 2), slice(1, 4, 2)):  # (height, width), (height, top), (width, left)
        assert p_value(*([b[part] for b in side] for side in boxes)) > LEVEL
    counts = [[len(image.context) for image in images] for images in (ours, theirs)]
    assert stats.ks_2samp(*counts).pvalue > LEVEL


def test_official_cut_is_distributed_as_in_the_plain_loop() -> None:
    """The context length that is left of batches of 8 images, over 250 steps."""
    config, rng = MaskConfig(mode="official"), np.random.default_rng(2)
    cut = [len(sample(config, 14, 14, num_images=8, step=step)[0].context) for step in range(250)]
    plain = [loop_step(config, 14, 14, 8, rng) for _ in range(250)]
    assert stats.ks_2samp(cut, [len(cut_masks_reference(images)[0].context) for images in plain]).pvalue > LEVEL
    assert stats.ks_2samp(cut, [len(images[0].context) for images in plain]).pvalue < LEVEL  # the test sees the cut


@pytest.mark.parametrize("mode", ["official", "ragged", "budget"])
def test_contexts_are_redrawn_as_in_the_plain_loop(mode: Any) -> None:
    """Where most contexts are invalid, so that target blocks are given up: counts and overlaps per image."""
    config = hard_to_mask(mode)
    # In official mode one image per call: more would be cut.
    calls, size = (300, 1) if mode == "official" else (1, 2000)
    ours = [image for step in range(calls) for image in sample(config, 7, 8, num_images=size, step=step)]
    theirs = loop_step(config, 7, 8, calls * size, np.random.default_rng(3))
    pairs = [[(len(image.context), overlap(image)) for image in images] for images in (ours, theirs)]
    share = sum(shared > 0 for _, shared in pairs[0]) / len(pairs[0])
    assert 0.1 < share < 0.9, "both sides of the rule must occur"
    assert p_value(*pairs) > LEVEL


def test_the_statistical_test_tells_shared_from_separate_draws() -> None:
    """Negative control: the sizes of the ragged mode are not those of the official one on the same grid."""
    rng = np.random.default_rng(4)
    modes: list[Any] = ["official", "ragged"]
    sizes = [[loop_sizes(MaskConfig(mode=mode), 14, 14, uniforms(rng)).target for _ in range(700)] for mode in modes]
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
    """2 of the 4 tokens of a quadrant: 4 quadrants x 6 subsets, all equally likely (chi-square, 23 degrees of freedom)."""
    config = MaskConfig(mode="budget", strategy="rasterized", num_target_blocks=3, context_budget=0.125, min_keep=0)
    counts = Counter(tuple(image.context) for image in sample(config, 4, 4, num_images=6000))
    assert {len(subset) for subset in counts} == {2}
    assert len(counts) == 24
    assert stats.chisquare([*counts.values()]).pvalue > LEVEL


@pytest.mark.parametrize(("budget", "min_keep", "kept"), [(0.25, 10, 49), (0.1, 24, 25)])
def test_budget_is_the_stricter_of_the_two_rules(budget: float, min_keep: int, kept: int) -> None:
    config = MaskConfig(mode="budget", context_budget=budget, min_keep=min_keep)
    masks = sample_masks(config, 14, 14, seed=0, step=0, sample_indices=torch.arange(64))
    assert masks.context.lengths().unique().tolist() == [kept]


def test_random_targets_are_uniform() -> None:
    config = MaskConfig(strategy="random", num_target_blocks=1, target_scale=(0.3, 0.3), min_keep=0)
    counts = Counter(tuple(image.targets[0]) for image in sample(config, 2, 5, num_images=6000))
    assert len(counts) == math.comb(10, 3)
    assert stats.chisquare([*counts.values()]).pvalue > LEVEL


# Grids


def brute_force_best(config: MaskConfig, h: int, w: int) -> int:
    """Tokens that the worst of finely swept block sizes leave to the context at the best of all positions."""
    sweep = np.linspace(0, 1, 201, endpoint=False).tolist()
    aspects = [0.0] if config.mode == "official" else sweep
    targets = {loop_sizes(config, h, w, (u, v, 0)).target for u in sweep for v in aspects}
    contexts = {loop_sizes(config, h, w, (0, 0, u)).context for u in sweep}
    lost = 1 if config.mode == "official" else 0

    def blocks(size: tuple[int, int]) -> list[set[int]]:
        corners = itertools.product(range(h - lost - size[0] + 1), range(w - lost - size[1] + 1))
        return [{(t + i) * w + s + j for i in range(size[0]) for j in range(size[1])} for t, s in corners]

    pairs = itertools.product(contexts, targets)
    return min(max(len(c - t) for c in blocks(context) for t in blocks(target)) for context, target in pairs)


@pytest.mark.parametrize("mode", ["official", "ragged"])
@pytest.mark.parametrize("grid", [(4, 4), (5, 7), (6, 6)])
@pytest.mark.parametrize("target_scale", [(0.15, 0.2), (0.2, 0.5)])
def test_check_grid_draws_the_line_where_brute_force_does(mode: Any, grid: tuple[int, int], target_scale: Any) -> None:
    best = brute_force_best(MaskConfig(mode=mode, target_scale=target_scale), *grid)
    assert accepted(MaskConfig(mode=mode, target_scale=target_scale, min_keep=best - 1), *grid)
    assert not accepted(MaskConfig(mode=mode, target_scale=target_scale, min_keep=best), *grid)


def test_check_grid_accepts_the_small_presets() -> None:
    """A 4x4 grid: a 4x4 context, targets of up to 2x2; official 3x3 contexts keep 5 tokens beside a 2x2 target."""
    assert accepted(MaskConfig(min_keep=5), 4, 4)
    assert accepted(MaskConfig(mode="budget", min_keep=5), 4, 4)
    assert accepted(MaskConfig(mode="official", min_keep=4), 4, 4)
    assert not accepted(MaskConfig(mode="official", min_keep=5), 4, 4)


@pytest.mark.parametrize(
    ("config", "grid", "named"),
    [
        (MaskConfig(min_keep=12), (4, 4), r"masks\.min_keep = 12: .*4x4 .* 13 tokens .*4x4 .*2x2 .*12"),
        (MaskConfig(mode="budget", context_budget=0.9), (14, 14), r"masks\.context_budget = 0\.9: .*14x14"),
        (MaskConfig(min_keep=0), (2, 3), r"masks\.target_scale = .*2x3 .*no patch"),
        (
            MaskConfig(mode="official", min_keep=0, num_target_blocks=1, strategy="block"),
            (1, 20),
            r"target_scale.*1x20",
        ),
        (MaskConfig(strategy="rasterized", num_target_blocks=3), (1, 60), r"masks\.strategy = rasterized: .*1x60"),
        (MaskConfig(strategy="rasterized", num_target_blocks=3), (7, 7), r"masks\.min_keep = 10: .*3x3"),
        (
            MaskConfig(strategy="random", num_target_blocks=1, target_scale=(0.5, 0.9)),
            (8, 8),
            r"min_keep.*57 patches leaves 7 at best",
        ),
    ],
)
def test_a_grid_without_valid_masks_is_refused_by_name(config: MaskConfig, grid: tuple[int, int], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        check_grid(config, *grid)
    with pytest.raises(ValueError, match=named):
        sample_masks(config, *grid, seed=0, step=0, sample_indices=torch.arange(2))


@pytest.mark.parametrize("bad", [torch.arange(0), torch.arange(3).int(), torch.arange(4).view(2, 2)])
def test_bad_sample_indices_are_refused(bad: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="sample_indices: got torch"):
        sample_masks(MaskConfig(), 14, 14, seed=0, step=0, sample_indices=bad)


def test_to_moves_every_tensor() -> None:
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
