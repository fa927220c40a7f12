"""Mask rules for tests, of every strategy and mode on any grid, and the comparison of masks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from fastjepa_kernels import MaskRules, PackedMasks

STRATEGIES = ("multiblock", "block", "random", "rasterized")
MODES = ("ragged", "official", "budget")

TIED_SAMPLE = 126_224
"""A sample index whose 49th and 50th smallest of 196 position words are equal, with seed 0 and step 0."""


def mask_rules(
    strategy: str, mode: str, grid_h: int, grid_w: int, *, num_target_blocks: int = 4, **other: Any
) -> MaskRules:
    """Rules with blocks of about a third of the grid's height and width, and a context block that leaves a row and a column.

    `other` replaces fields of the rules.
    """
    kind: Any = strategy
    any_mode: Any = mode
    reach_h, reach_w = (grid_h - 1, grid_w - 1) if mode == "official" else (grid_h, grid_w)
    rules = MaskRules(
        strategy=kind,
        mode=any_mode,
        grid_h=grid_h,
        grid_w=grid_w,
        reach_h=reach_h,
        reach_w=reach_w,
        target_h=max(grid_h // 3, 1),
        target_w=max(grid_w // 3, 1),
        context_h=max(reach_h - 1, 1),
        context_w=max(reach_w - 1, 1),
        target_count=max(grid_h * grid_w // 4, 1),
        num_target_blocks={"multiblock": num_target_blocks, "rasterized": 3}.get(strategy, 1),
        min_context=max(grid_h // 2 * (grid_w // 2) // 2, 1),
    )
    return replace(rules, **other)


def hard_rules(mode: str) -> MaskRules:
    """Rules on a 7x8 grid that leave most contexts too small, so that target blocks are given up."""
    return mask_rules("multiblock", mode, 7, 8, target_h=3, target_w=3, context_h=6, context_w=7, min_context=19)


def assert_same_masks(masks: PackedMasks, expected: PackedMasks) -> None:
    """Assert that `masks` equal `expected` in every entry, and are 0 beyond the true sizes."""
    wrong = []
    for name, got, want in zip(PackedMasks._fields, masks, expected, strict=True):
        beyond = len(want) if name.endswith(("indices", "rows")) else len(got)
        equal = got.dtype == want.dtype and torch.equal(got[:beyond].cpu(), want)
        if not equal or got[beyond:].any():
            wrong.append(name)
    assert not wrong, f"these differ, or are not 0 beyond their true size: {', '.join(wrong)}"
