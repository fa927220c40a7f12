"""Every change that fastjepa makes to DeepSpeed's behaviour, each with its reason."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from fastjepa import distributed
from fastjepa.errors import ConfigError
from fastjepa.objectives.ijepa.objective import IJEPA
from fastjepa.optim.adamw_ema import AdamWEMA


def _order_on_the_device(zero: Any) -> None:
    """With overlap_comm, ZeRO 1 and 2 end a backward pass by waiting until the whole GPU is idle. But all that comes next on
    the current stream needs is the reduced gradients: so let that stream wait for the reductions, not the host."""
    accelerator = sys.modules[type(zero).__module__].get_accelerator()
    epilogue = zero.independent_gradient_partition_epilogue

    def without_the_host() -> None:
        accelerator.synchronize = lambda: accelerator.current_stream().wait_stream(zero.reduction_stream)
        try:
            epilogue()
        finally:
            del accelerator.synchronize

    zero.independent_gradient_partition_epilogue = without_the_host


def _initialize(model: IJEPA, optimizer: AdamWEMA, settings: dict[str, Any], path: str | Path) -> Any:
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    import deepspeed.ops
    from pydantic import ValidationError

    if not torch.cuda.is_available():
        # Else the first run compiles an extension for a minute without a word, and hangs on its lock if interrupted.
        compatible = getattr(deepspeed.ops, "__compatible_ops__", None)
        if isinstance(compatible, dict) and "deepspeed_shm_comm" in compatible:
            compatible["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel(logging.WARNING)
    # Two warnings that are not for the user: about an optimizer that it was not tested with, and about its own calls.
    deepspeed.utils.logger.addFilter(lambda record: "untested optimizer" not in record.getMessage())
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning, "torch.distributed")
    distributed.init_single_process_group()
    # Not always LOCAL_RANK: SLURM may show each rank only its own GPU. ZeRO 3 takes the variable for the GPU's number, and
    # DeepSpeed asks for it even where a single process runs without a launcher.
    gpu = torch.cuda.current_device() if torch.cuda.is_available() else 0
    args = argparse.Namespace(device_rank=gpu)
    local_rank = os.environ.get("LOCAL_RANK", "0")
    os.environ["LOCAL_RANK"] = str(gpu)
    try:
        engine, *_ = deepspeed.initialize(args, model=model, optimizer=optimizer, config=settings)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))} = {e['input']!r}: {e['msg']}" for e in error.errors())
        raise ConfigError(f"{path}: {error.title}: {problems}") from error
    finally:
        os.environ["LOCAL_RANK"] = local_rank
    return engine
