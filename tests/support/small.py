"""Small configurations, networks and inputs that several tests share."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import cast

import torch

from fastjepa import distributed
from fastjepa.config import Config, DataConfig, ModelConfig, OptimConfig
from fastjepa.config.batch_sizes import BatchSizes
from fastjepa.engine.base import Engine
from fastjepa.engine.build import build_engine
from fastjepa.objectives.ijepa.block_sizes import MaskConfig
from fastjepa.objectives.ijepa.masks import sample_masks
from fastjepa.objectives.ijepa.objective import IJEPAObjective, MaskedImages
from fastjepa.objectives.ijepa.settings import IJEPAConfig
from fastjepa.objectives.registry import build_objective, method_of


def small_config(*, image_size: int | tuple[int, int] = (24, 32), in_channels: int = 2, **changes: object) -> Config:
    """A model of width 24, depth 3 on a 6 x 8 grid: every dimension another number.

    Args:
        changes: settings of `Config` or of `IJEPAConfig`, in place of these.
    """
    model = ModelConfig(patch_size=4, embed_dim=24, depth=3, num_heads=3, init="fan_in")
    data = DataConfig(
        image_size=image_size, in_channels=in_channels, mean=(0.5,) * in_channels, std=(0.25,) * in_channels
    )
    objective = IJEPAConfig(predictor_embed_dim=12, predictor_depth=2, masks=MaskConfig(min_keep=2))
    of_objective = {f.name for f in fields(IJEPAConfig)} & changes.keys()
    objective = replace(objective, **{name: changes.pop(name) for name in of_objective})  # type: ignore[arg-type]
    settings = {
        "data": data,
        "model": model,
        "objective": objective,
        "global_batch_size": 4,
        "epochs": 1,
        "optim": OptimConfig(warmup_epochs=0),
    }
    return Config(**(settings | changes))  # type: ignore[arg-type]


def build_ijepa(config: Config) -> IJEPAObjective:
    """The freshly initialised networks of a run of I-JEPA."""
    return cast(IJEPAObjective, build_objective(method_of(config)))


def engine_of(config: Config, sizes: BatchSizes, device: torch.device, ds_config: str | Path | None = None) -> Engine:
    """The engine of a run with freshly initialised networks."""
    method = method_of(config)
    return build_engine(build_objective(method), method, config, sizes, device, ds_config)


def config_of(engine: Engine) -> Config:
    """The settings of the run that an engine of I-JEPA carries out."""
    return cast(IJEPAObjective, engine.model).config


def small_batch(
    config: Config, batch_size: int = 3, *, step: int = 0, dtype: torch.dtype = torch.float32
) -> MaskedImages:
    """Noise, and masks sampled for it."""
    generator = torch.Generator().manual_seed(step)
    height, width = config.data.image_hw
    images = torch.randn(batch_size, config.data.in_channels, height, width, generator=generator, dtype=dtype)
    indices = torch.arange(batch_size) + step * batch_size
    masks = IJEPAConfig.of(config).masks
    return MaskedImages(
        images, sample_masks(masks, config.grid_h, config.grid_w, seed=1, step=step, sample_indices=indices)
    )


def finish_with(results: object, folder: Path) -> None:
    """The end of a worker, for all ranks: the first one's results go into results.json, before any rank leaves."""
    if distributed.rank() == 0:
        (folder / "results.json").write_text(json.dumps(results))
    distributed.raise_together(None)
    distributed.finish()
