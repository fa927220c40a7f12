"""Small configurations and inputs that several tests share."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from fastjepa import distributed
from fastjepa.config import Config, DataConfig, MaskConfig, ModelConfig, OptimConfig
from fastjepa.objectives.ijepa.masks import MaskBatch, sample_masks


def small_config(*, image_size: int | tuple[int, int] = (24, 32), in_channels: int = 2, **changes: object) -> Config:
    """A model of width 24, depth 3 on a 6 x 8 grid: every dimension another number."""
    model = ModelConfig(
        patch_size=4, embed_dim=24, depth=3, num_heads=3, predictor_embed_dim=12, predictor_depth=2, init="fan_in"
    )
    data = DataConfig(
        image_size=image_size, in_channels=in_channels, mean=(0.5,) * in_channels, std=(0.25,) * in_channels
    )
    masks = MaskConfig(min_keep=2)
    config = Config(
        data=data, model=model, masks=masks, global_batch_size=4, epochs=1, optim=OptimConfig(warmup_epochs=0)
    )
    return replace(config, **changes)  # type: ignore[arg-type]


def small_batch(
    config: Config, batch_size: int = 3, *, step: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, MaskBatch]:
    generator = torch.Generator().manual_seed(step)
    height, width = config.data.image_hw
    images = torch.randn(batch_size, config.data.in_channels, height, width, generator=generator, dtype=dtype)
    indices = torch.arange(batch_size) + step * batch_size
    return images, sample_masks(config.masks, config.grid_h, config.grid_w, seed=1, step=step, sample_indices=indices)


def finish_with(results: object, folder: Path) -> None:
    """The end of a worker, for all ranks: the first one's results go into results.json, before any rank leaves."""
    if distributed.rank() == 0:
        (folder / "results.json").write_text(json.dumps(results))
    distributed.raise_together(None)
    distributed.finish()
