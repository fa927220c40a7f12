"""The predictor: names of its parameters, initialisation, and its savings where they meet in one block."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastjepa.config import Config
from fastjepa.objectives.ijepa.predictor import Predictor
from fastjepa.objectives.ijepa.settings import IJEPAConfig, Savings
from tests.objectives.ijepa.test_objective import perturbed
from tests.support.small import small_batch, small_config

BLOCK = [
    f"{layer}.{kind}"
    for layer in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    for kind in ("weight", "bias")
]


def predictor_of(config: Config) -> Predictor:
    return Predictor(IJEPAConfig.of(config), config.model, config.grid_h, config.grid_w)


def test_parameter_names_are_those_of_the_official_checkpoints() -> None:
    names = ["mask_token", "predictor_pos_embed"]
    names += [f"predictor_{layer}.{kind}" for layer in ("embed", "norm", "proj") for kind in ("weight", "bias")]
    names += [f"predictor_blocks.{i}.{name}" for i in range(2) for name in BLOCK]
    assert predictor_of(small_config()).state_dict().keys() == set(names)


@pytest.mark.parametrize(
    ("name", "depth"),
    [("vit_tiny", 6), ("vit_small", 6), ("vit_base", 6), ("vit_large", 12), ("vit_huge", 12), ("vit_giant", 16)],
)
def test_each_named_model_has_the_published_predictor(name: Any, depth: int) -> None:
    assert IJEPAConfig().depth_of_predictor(name) == depth
    assert IJEPAConfig().predictor_embed_dim == 384
    assert IJEPAConfig(predictor_depth=3).depth_of_predictor(name) == 3


def test_the_mask_token_is_drawn_with_std_0_02_and_is_not_cut() -> None:
    torch.manual_seed(0)
    token = predictor_of(small_config(predictor_embed_dim=1200)).mask_token
    assert token.std().item() == pytest.approx(0.02, rel=0.06)
    assert token.abs().max() > 0.05


def test_its_heads_are_those_of_the_encoder() -> None:
    config = small_config()
    for block in predictor_of(config).predictor_blocks:
        assert block.attn.num_heads == config.model.size.num_heads  # type: ignore[union-attr]


def test_savings_change_nothing_in_a_predictor_of_one_block() -> None:
    """The only block is the first and the last one, to which a saving each applies."""
    config = small_config(predictor_depth=1)
    without = small_config(predictor_depth=1, savings=Savings(predictor_last_block=False, predictor_first_block=False))
    batch = small_batch(config, dtype=torch.float64)
    losses = [perturbed(each)(batch).loss for each in (config, without)]
    torch.testing.assert_close(*losses, rtol=0, atol=1e-10)
