"""The block sizes of a step, and the grids that are refused because no mask is valid on them."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from fastjepa.errors import ConfigError
from fastjepa.objectives.ijepa.block_sizes import MaskConfig, check_grid, rules_of_step
from fastjepa.objectives.ijepa.masks import sample_masks
from tests.support.plain_masks import is_accepted, plain_rules, plain_sizes, sizes_of_step


@pytest.mark.parametrize("mode", ["ragged", "official", "budget"])
@pytest.mark.parametrize("grid", [(14, 14), (6, 9)])
def test_the_rules_of_a_step_equal_the_plain_implementation(mode: Any, grid: tuple[int, int]) -> None:
    """`plain_sizes` computes them from the same random words."""
    config = MaskConfig(mode=mode)
    for seed, step in ((0, 0), (0, 1), (5, 123_456), (2**64 - 1, 2**32 - 1)):
        expected = plain_rules(config, *grid, sizes_of_step(config, *grid, seed=seed, step=step))
        assert rules_of_step(config, *grid, seed=seed, step=step) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_target_blocks": 0}, r"objective\.masks\.num_target_blocks = 0: expected a positive number"),
        ({"strategy": "block"}, r"num_target_blocks = 4: expected 1 with objective\.masks\.strategy = block"),
        ({"strategy": "rasterized"}, r"num_target_blocks = 4: expected 3 with objective\.masks\.strategy = rasterized"),
        ({"target_scale": (0.3, 0.2)}, r"objective\.masks\.target_scale = \[0\.3, 0\.2\]: expected \[min, max\]"),
        ({"target_aspect_ratio": (0.0, 1.0)}, r"objective\.masks\.target_aspect_ratio = .*0 < min <= max"),
        ({"context_scale": (0.5, 1.5)}, r"objective\.masks\.context_scale = .*<= 1"),
        ({"context_budget": 1.0}, r"objective\.masks\.context_budget = 1\.0: expected a share between 0 and 1"),
        ({"min_keep": -1}, r"objective\.masks\.min_keep = -1: expected 0 or more"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MaskConfig(**settings)


def brute_force_best(config: MaskConfig, h: int, w: int) -> int:
    """Tokens that the context keeps at the best of all positions, for the worst of finely swept block sizes."""
    sweep = np.linspace(0, 1, 201, endpoint=False).tolist()
    aspects = [0.0] if config.mode == "official" else sweep
    targets = {plain_sizes(config, h, w, (u, v, 0)).target for u in sweep for v in aspects}
    contexts = {plain_sizes(config, h, w, (0, 0, u)).context for u in sweep}
    lost = 1 if config.mode == "official" else 0

    def blocks(size: tuple[int, int]) -> list[set[int]]:
        corners = itertools.product(range(h - lost - size[0] + 1), range(w - lost - size[1] + 1))
        return [{(t + i) * w + s + j for i in range(size[0]) for j in range(size[1])} for t, s in corners]

    pairs = itertools.product(contexts, targets)
    return min(max(len(c - t) for c in blocks(context) for t in blocks(target)) for context, target in pairs)


@pytest.mark.parametrize("mode", ["official", "ragged"])
@pytest.mark.parametrize("grid", [(4, 4), (5, 7), (6, 6)])
@pytest.mark.parametrize("target_scale", [(0.15, 0.2), (0.2, 0.5)])
def test_check_grid_accepts_exactly_what_brute_force_finds_valid(
    mode: Any, grid: tuple[int, int], target_scale: Any
) -> None:
    best = brute_force_best(MaskConfig(mode=mode, target_scale=target_scale), *grid)
    assert is_accepted(MaskConfig(mode=mode, target_scale=target_scale, min_keep=best - 1), *grid)
    assert not is_accepted(MaskConfig(mode=mode, target_scale=target_scale, min_keep=best), *grid)


def test_check_grid_accepts_4x4_grids_with_small_min_keep() -> None:
    """On a 4x4 grid the context is 4x4 and targets are up to 2x2; in official mode 3x3 and 2x2, which leaves 5 tokens."""
    assert is_accepted(MaskConfig(min_keep=5), 4, 4)
    assert is_accepted(MaskConfig(mode="budget", min_keep=5), 4, 4)
    assert is_accepted(MaskConfig(mode="official", min_keep=4), 4, 4)
    assert not is_accepted(MaskConfig(mode="official", min_keep=5), 4, 4)


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
def test_a_grid_without_valid_masks_is_refused_and_the_setting_named(
    config: MaskConfig, grid: tuple[int, int], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        check_grid(config, *grid)
    with pytest.raises(ConfigError, match=named):
        sample_masks(config, *grid, seed=0, step=0, sample_indices=torch.arange(2))
