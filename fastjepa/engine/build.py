"""Builds the engine of a run, after it has chosen the kernels."""

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
from fastjepa.objectives.base import Method, Objective
from fastjepa_kernels import Operation


def operations_of(method: Method, dtype: torch.dtype) -> list[Operation]:
    """Every operation that a run calls, if blocks compute in `dtype`: the method's, and the optimizer's."""
    return [*method.operations(dtype), Operation("adamw_ema", torch.float32)]


def _choose_kernels(config: Config, method: Method, device: torch.device) -> None:
    """Choose before the first step, so that an implementation that cannot run is a mistake in the settings, not a crash.

    Raises:
        ConfigError: one that was asked for cannot run here; the message lists those that can.
    """
    try:
        fastjepa_kernels.request(dataclasses.asdict(config.kernels))
        for operation in operations_of(method, resolve_precision(config, device)):
            operation.choose(device.type)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def build_engine(
    model: Objective,
    method: Method,
    config: Config,
    sizes: BatchSizes,
    device: torch.device,
    ds_config: str | Path | None,
) -> Engine:
    """The engine of a run, on all ranks.

    Args:
        ds_config: DeepSpeed's JSON; None: plain PyTorch.

    Raises:
        ConfigError: kernels, precision, compilation or DeepSpeed's settings cannot be had here.
    """
    with distributed.share_errors():
        _choose_kernels(config, method, device)
        if config.target_precision == "fp8":
            check_fp8(config, device, resolve_precision(config, device))
            for part in model.parts:
                if part.averages:
                    use_fp8(part.module)
    if ds_config is None:
        engine: Engine = TorchEngine(model, method, config, sizes, device)
    else:
        engine = DeepSpeedEngine(model, method, config, sizes, device, ds_config)
    distributed.extend_timeouts(config.hang_timeout)  # DeepSpeed made groups of its own
    return engine
