"""Mask sampling on the host equals the plain twin in every number, and keeps what the rules promise."""

from __future__ import annotations

from dataclasses import replace
from operator import length_hint
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastjepa_kernels import MaskRules, PackedMasks, mask_sampling
from fastjepa_kernels.philox import DOMAIN_BLOCK_POSITION
from fastjepa_kernels.reference import image_masks_reference, mask_sampling_reference, mask_words_reference
from tests.support.mask_rules import MODES, STRATEGIES, TIED_SAMPLE, assert_same_masks, hard_rules, mask_rules

cheap = settings(max_examples=100, deadline=None, derandomize=True)
ids = st.lists(st.integers(0, 2**40), min_size=1, max_size=5)


@st.composite
def any_rules(draw: st.DrawFn) -> MaskRules:
    strategy: Any = draw(st.sampled_from(["multiblock", *STRATEGIES]))
    mode: Any = draw(st.sampled_from(MODES))
    grid_h, grid_w = draw(st.integers(2, 9)), draw(st.integers(2, 9))
    reach_h, reach_w = (grid_h - 1, grid_w - 1) if mode == "official" else (grid_h, grid_w)
    num_patches = grid_h * grid_w
    target_h, target_w = draw(st.integers(1, reach_h)), draw(st.integers(1, reach_w))
    if target_h * target_w == num_patches and strategy == "block":
        target_w -= 1
    context_h, context_w = draw(st.integers(1, reach_h)), draw(st.integers(1, reach_w))
    target_count = draw(st.integers(1, num_patches - 1))
    most = {
        "multiblock": context_h * context_w,
        "block": num_patches - target_h * target_w,
        "random": num_patches - target_count,
        "rasterized": grid_h // 2 * (grid_w // 2),
    }[strategy]
    return MaskRules(
        strategy=strategy,
        mode=mode,
        grid_h=grid_h,
        grid_w=grid_w,
        reach_h=reach_h,
        reach_w=reach_w,
        target_h=target_h,
        target_w=target_w,
        context_h=context_h,
        context_w=context_w,
        target_count=target_count,
        num_target_blocks=draw(st.integers(1, 5)) if strategy == "multiblock" else {"rasterized": 3}.get(strategy, 1),
        min_context=draw(st.integers(1, most)),
    )


def sequences(indices: torch.Tensor, cu_seqlens: torch.Tensor) -> list[list[int]]:
    return [part.tolist() for part in indices.split(cu_seqlens.diff().tolist())]


@cheap
@given(any_rules(), st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1), ids)
def test_masks_are_those_of_the_plain_loop(rules: MaskRules, seed: int, step: int, ids: list[int]) -> None:
    numbers: Any = {"seed": seed, "step": step, "sample_indices": torch.tensor(ids)}
    assert_same_masks(mask_sampling(rules, **numbers), mask_sampling_reference(rules, **numbers))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("strategy", ["hard", *STRATEGIES])
def test_masks_of_many_images_are_those_of_the_plain_loop(strategy: str, mode: str) -> None:
    rules = hard_rules(mode) if strategy == "hard" else mask_rules(strategy, mode, 7, 6)
    numbers: Any = {"seed": 2**63 + 5, "step": 7, "sample_indices": torch.arange(130)}
    assert_same_masks(mask_sampling(rules, **numbers), mask_sampling_reference(rules, **numbers))


@cheap
@given(any_rules(), ids)
def test_masks_keep_the_rules(rules: MaskRules, ids: list[int]) -> None:
    """Context and targets are disjoint, unless target blocks were given up because too few tokens were left. Each sequence
    is sorted, lies in its own image, and is no longer than the rules allow."""
    masks = mask_sampling(rules, seed=1, step=2, sample_indices=torch.tensor(ids))
    m, n = rules.num_target_blocks, rules.num_patches
    contexts = sequences(masks.context_indices, masks.context_cu_seqlens)
    targets = sequences(masks.target_indices, masks.target_cu_seqlens)
    assert len(contexts) == len(ids)
    assert len(targets) == len(ids) * m
    for b, context in enumerate(contexts):
        own = targets[b * m : (b + 1) * m]
        for sequence in (context, *own):
            assert sequence == sorted({i for i in sequence if i // n == b})
        given_up = not set(context).isdisjoint(set().union(*own))
        assert not given_up or rules.strategy == "multiblock"
        assert len(context) <= rules.max_context
        assert sum(map(len, own)) <= rules.max_target
        assert len(set().union(*own)) <= rules.max_union
        rows, cols = ({i % n // rules.grid_w for i in context}, {i % n % rules.grid_w for i in context})
        if rules.strategy == "multiblock":
            assert max(rows) < rules.reach_h
            assert max(cols) < rules.reach_w
            assert max(rows) - min(rows) < rules.context_h
            assert max(cols) - min(cols) < rules.context_w
            assert {len(target) for target in own} == {rules.target_h * rules.target_w}
        if rules.mode == "budget":
            assert len(context) == rules.min_context
        elif rules.strategy == "multiblock" and rules.mode == "ragged":
            assert len(context) >= rules.min_context
    if rules.mode == "official":
        assert len({len(context) for context in contexts}) == 1
        assert len({len(target) for target in targets}) == 1


def test_hard_rules_give_up_target_blocks_in_some_images() -> None:
    """Tests with these rules must see images that give up target blocks and images that do not."""
    rules = hard_rules("ragged")
    masks = mask_sampling(rules, seed=2**63 + 5, step=7, sample_indices=torch.arange(130))
    contexts = sequences(masks.context_indices, masks.context_cu_seqlens)
    unions = sequences(masks.union_indices, masks.union_cu_seqlens)
    shared = [not set(context).isdisjoint(union) for context, union in zip(contexts, unions, strict=True)]
    assert 10 < sum(shared) < 120


def test_hard_rules_need_from_one_to_many_attempts() -> None:
    """The host draws one attempt for all images, then 20 at a time for those without a context. Test all these cases."""
    rules = hard_rules("ragged")
    attempts = set()
    for sample in range(130):
        word = mask_words_reference(DOMAIN_BLOCK_POSITION, sample, 7, 2**63 + 5)
        words = iter([word() for _ in range(1000)])
        image_masks_reference(rules, words.__next__, word)
        attempts.add((1000 - length_hint(words)) // 2 - rules.num_target_blocks)
    assert {1, 2, 3, 21, 41} <= attempts


def test_the_earlier_patch_wins_where_two_words_are_equal() -> None:
    word = mask_words_reference(DOMAIN_BLOCK_POSITION, TIED_SAMPLE, 0, 0)
    words = [word() for _ in range(196)]
    tied = sorted(words)[48]
    earlier, later = (patch for patch in range(196) if words[patch] == tied)
    rules = mask_rules("random", "ragged", 14, 14, target_count=49)
    numbers: Any = {"seed": 0, "step": 0, "sample_indices": torch.tensor([TIED_SAMPLE])}
    for masks in (mask_sampling(rules, **numbers), mask_sampling_reference(rules, **numbers)):
        assert earlier in masks.target_indices
        assert later in masks.context_indices


def test_only_the_lower_half_of_a_sample_index_counts() -> None:
    rules = mask_rules("multiblock", "ragged", 7, 6)
    low, high = (
        mask_sampling(rules, seed=0, step=0, sample_indices=torch.tensor([5, 6]) + shift) for shift in (0, 3 * 2**32)
    )
    assert_same_masks(high, low)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"seed": 2**64}, "seed: got 18446744073709551616, expected"),
        ({"seed": -1}, "seed: got -1"),
        ({"step": 2**32}, "step: got 4294967296"),
        ({"sample_indices": torch.arange(0)}, r"sample_indices: got torch.int64 \[0\], expected torch.int64 \[B\]"),
        ({"sample_indices": torch.arange(3).int()}, "sample_indices: got torch.int32"),
        ({"sample_indices": torch.zeros(1, dtype=torch.int64).expand(2**25)}, "expected fewer than 2.31 tokens"),
    ],
)
def test_arguments_out_of_range_are_refused(wrong: dict[str, Any], named: str) -> None:
    good: dict[str, Any] = {"seed": 0, "step": 0, "sample_indices": torch.arange(2)}
    with pytest.raises(ValueError, match=named):
        mask_sampling(mask_rules("multiblock", "ragged", 7, 6), **good | wrong)


@pytest.mark.parametrize(
    ("strategy", "wrong", "named"),
    [
        ("multiblock", {"num_target_blocks": 0}, "num_target_blocks: got 0"),
        ("rasterized", {"num_target_blocks": 2}, "num_target_blocks: got 2 with strategy rasterized, expected 3"),
        ("multiblock", {"min_context": 31}, "min_context: got 31, expected a number from 1 to 30"),
        ("rasterized", {"min_context": 10}, "min_context: got 10, expected a number from 1 to 9"),
        ("random", {"target_count": 42}, "target_count: got 42, expected a number from 1 to 41"),
        ("multiblock", {"context_h": 8}, "context_h: got 8, expected a number from 1 to 7"),
        ("block", {"target_w": 0}, "target_w: got 0"),
        ("block", {"reach_w": 7}, "reach_w: got 7, expected a number from 1 to 6"),
    ],
)
def test_rules_without_valid_masks_are_refused(strategy: str, wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        replace(mask_rules(strategy, "ragged", 7, 6), **wrong)


@pytest.mark.parametrize("name", PackedMasks._fields)
def test_a_wrong_entry_would_be_seen(name: str) -> None:
    """A negative control of the comparison that the tests share."""
    numbers: Any = {"seed": 0, "step": 0, "sample_indices": torch.arange(2)}
    rules = mask_rules("multiblock", "ragged", 7, 6)
    masks, expected = mask_sampling(rules, **numbers), mask_sampling_reference(rules, **numbers)
    getattr(masks, name).view(-1)[-1] += 1
    with pytest.raises(AssertionError, match=name):
        assert_same_masks(masks, expected)
