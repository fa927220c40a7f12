"""The encoder: names of its parameters, sizes, positions, initialisation, features."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from fastjepa.config import MODEL_SIZES, Config, DataConfig, ModelConfig
from fastjepa.errors import ConfigError
from fastjepa.models.layers import Block, sincos_position_table
from fastjepa.models.vision_transformer import VisionTransformer
from tests.support import plain_ijepa
from tests.support.small import small_config

BLOCK = [
    f"{layer}.{kind}"
    for layer in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    for kind in ("weight", "bias")
]


def encoder_of(config: Config) -> VisionTransformer:
    return VisionTransformer(config.model, config.data)


def test_parameter_names_are_those_of_the_official_checkpoints() -> None:
    names = ["pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias", "norm.weight", "norm.bias"]
    names += [f"blocks.{i}.{name}" for i in range(3) for name in BLOCK]
    assert encoder_of(small_config()).state_dict().keys() == set(names)


@pytest.mark.parametrize(
    ("name", "millions"),
    # The published architecture has 12 D^2 + 13 D per block at ratio 4, D (3 p^2 + 1) for the patches, 2 D for the norm.
    [
        ("vit_tiny", 5.5),
        ("vit_small", 21.6),
        ("vit_base", 85.8),
        ("vit_large", 303.3),
        ("vit_huge", 630.8),
        ("vit_giant", 1011.4),
    ],
)
def test_sizes_are_the_published_ones(name: Any, millions: float) -> None:
    patch_size = 14 if name in ("vit_huge", "vit_giant") else 16
    with torch.device("meta"):
        model = VisionTransformer(ModelConfig(name=name, patch_size=patch_size), DataConfig())
    size = MODEL_SIZES[name]
    d, hidden = size.embed_dim, round(size.embed_dim * size.mlp_ratio)
    block = 4 * d * d + 4 * d + 2 * d * hidden + hidden + d + 4 * d
    expected = size.depth * block + d * (3 * patch_size**2 + 1) + 2 * d
    count = sum(p.numel() for p in model.parameters())
    assert count == expected
    assert abs(count / 1e6 - millions) < 0.06 * millions / 10 + 0.1


def test_positions_follow_the_convention_of_mae() -> None:
    """The first half is for columns, the second for rows; in each, sines before cosines of pos * 10000^(-k / (D / 4))."""
    table = sincos_position_table(8, 2, 3)
    assert table.shape == (1, 6, 8)
    row, column = 1, 2
    expected = [f(p * w) for p in (column, row) for f in (math.sin, math.cos) for w in (1.0, 0.01)]
    torch.testing.assert_close(table[0, row * 3 + column], torch.tensor(expected), rtol=0, atol=1e-7)


def test_features_of_whole_images_equal_the_plain_encoder() -> None:
    model = encoder_of(small_config()).double()
    images = torch.randn(2, 2, 24, 32, dtype=torch.float64)
    everything = torch.arange(48)
    expected = torch.stack([plain_ijepa.encoder(image, everything, model.state_dict(), 3, 3, 4) for image in images])
    torch.testing.assert_close(model(images), expected, rtol=0, atol=1e-12)


def test_images_of_another_size_are_refused_with_both_sizes() -> None:
    with pytest.raises(ValueError, match=r"\(1, 3, 24, 32\), expected .* \(2, 24, 32\)"):
        encoder_of(small_config())(torch.zeros(1, 3, 24, 32))


def test_a_size_that_the_patch_does_not_divide_is_refused_with_both_numbers() -> None:
    with pytest.raises(ConfigError, match=r"data\.image_size = \[30, 32\].*model\.patch_size = 4"):
        replace(small_config(), data=DataConfig(image_size=(30, 32)))


@pytest.mark.parametrize(
    ("init", "qkv", "proj_of_block_3"),
    [("official", 0.02, 0.02), ("depth_rescale", 0.02, 0.02 / 6**0.5), ("fan_in", 48**-0.5, 48**-0.5 / 6**0.5)],
)
def test_initialisation_has_the_stated_spread(init: Any, qkv: float, proj_of_block_3: float) -> None:
    config = small_config()
    config = replace(config, model=replace(config.model, embed_dim=48, init=init))
    torch.manual_seed(0)
    model = encoder_of(config)
    block = model.blocks[2]
    assert isinstance(block, Block)
    cut = init == "fan_in"  # at two standard deviations, which keeps 0.8796 of the spread
    for weight, std in ((block.attn.qkv.weight, qkv), (block.attn.proj.weight, proj_of_block_3)):
        assert weight.std().item() == pytest.approx((0.8796 if cut else 1.0) * std, rel=0.04)
        assert (weight.abs().max().item() <= 2 * std + 1e-6) == cut
    assert block.attn.qkv.bias is not None
    assert not block.attn.qkv.bias.any()
    assert (model.norm.weight == 1).all()
