"""Chooses the kernels and builds the engine of a run."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

import fastjepa_kernels
from fastjepa import distributed
from fastjepa.config import Config
from fastjepa.config.batch_sizes import BatchSizes
from fastjepa.engine.base import Engine, resolve_precision
from fastjepa.engine.deepspeed_engine import DeepSpeedEngine
from fastjepa.engine.torch_engine import TorchEngine
from fastjepa.errors import ConfigError
from fastjepa.models.fp8 import check_fp8, use_fp8
from fastjepa.objectives.ijepa.objective import IJEPA


def _choose_kernels(config: Config, device: torch.device) -> None:
    """Before the first step, so that an implementation that cannot run is a mistake in the settings, not a crash.

    Raises:
        ConfigError: one that was asked for cannot run here; the message lists those that can.
    """
    size, predictor_width = config.model.size, config.model.predictor_embed_dim
    head_dims = {size.embed_dim // size.num_heads, predictor_width // size.num_heads}
    dtype = resolve_precision(config, device)
    try:
        fastjepa_kernels.request(dataclasses.asdict(config.kernels))
        for operation in ("masked_gather", "target_loss", "linear"):
            fastjepa_kernels.choose(operation, device.type, dtype)
        for head_dim in sorted(head_dims):
            fastjepa_kernels.choose("block_attention", device.type, dtype, head_dim)
        fastjepa_kernels.choose("adamw_ema", device.type, torch.float32)
        fastjepa_kernels.choose("mask_sampling", device.type, torch.int64)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def build_engine(
    model: IJEPA, config: Config, sizes: BatchSizes, device: torch.device, ds_config: str | Path | None
) -> Engine:
    with distributed.share_errors():
        _choose_kernels(config, device)
        if config.target_precision == "fp8":
            check_fp8(config, device, resolve_precision(config, device))
            use_fp8(model.target_encoder)
    if ds_config is None:
        engine: Engine = TorchEngine(model, config, sizes, device)
    else:
        engine = DeepSpeedEngine(model, config, sizes, device, ds_config)
    distributed.extend_timeouts(config.hang_timeout)  # DeepSpeed made groups of its own
    return engine
