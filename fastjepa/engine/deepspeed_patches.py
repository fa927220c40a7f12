"""Every place where fastjepa changes what DeepSpeed does, each with its reason.

They were made for DeepSpeed 0.19.8. A patch that replaces a function of DeepSpeed checks that the function is still there.
If it is not, that is logged once, and DeepSpeed goes its own way, which is slower but not wrong. The others (`_quieten`,
`_local_rank`, `forget`) replace nothing. tests/engine/test_deepspeed_patches.py holds that the installed version still needs
them.
"""

from __future__ import annotations

import argparse
import functools
import gc
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fastjepa import distributed
from fastjepa.errors import ConfigError
from fastjepa.objectives.base import Objective
from fastjepa.optim.adamw_ema import AdamWEMA

logger = logging.getLogger(__name__)

SHM_COMM = "deepspeed_shm_comm"
"""An extension of DeepSpeed for CPUs."""
EPILOGUE = "independent_gradient_partition_epilogue"
"""The method of ZeRO 1 and 2 that ends a backward pass."""
GATHER = "all_gather_dp_groups"
"""The function that the steps of ZeRO 1 and 2 and update_lp_params call, in the namespace of the optimizer's module."""
OFFLOAD = "deepspeed.runtime.zero.parameter_offload"
"""The module of ZeRO 3 that has the list of the modules that compute."""


def initialize(model: Objective, optimizer: AdamWEMA, settings: dict[str, Any], path: str | Path) -> Any:
    """DeepSpeed's engine.

    Args:
        settings: of `read_ds_config`.
        path: the file that they were read from, for messages.

    Raises:
        ConfigError: DeepSpeed refuses a setting; the message names file and key.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    import deepspeed.ops
    from pydantic import ValidationError

    if not torch.cuda.is_available():
        _without_shm_comm(deepspeed.ops)
    _quieten(deepspeed)
    distributed.init_single_process_group()
    gpu = torch.cuda.current_device() if torch.cuda.is_available() else 0
    try:
        with _local_rank(gpu):
            arguments = argparse.Namespace(device_rank=gpu)
            engine, *_ = deepspeed.initialize(arguments, model=model, optimizer=optimizer, config=settings)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))} = {e['input']!r}: {e['msg']}" for e in error.errors())
        raise ConfigError(f"{path}: {error.title}: {problems}") from error
    return engine


def _without_shm_comm(ops: Any) -> None:
    """Keep DeepSpeed from compiling its extension for CPUs.

    The first run would compile for a minute without a word, and a run that follows an interrupted one would hang on its
    lock.
    """
    compatible = getattr(ops, "__compatible_ops__", {})
    if SHM_COMM in compatible:
        compatible[SHM_COMM] = False
    else:
        _no_longer_there(SHM_COMM)


def _quieten(deepspeed: Any) -> None:
    """Drop messages that do not concern the user: an untested optimizer, and deprecated calls of DeepSpeed's own."""
    deepspeed.utils.logger.setLevel(logging.WARNING)
    deepspeed.utils.logger.addFilter(lambda record: "untested optimizer" not in record.getMessage())
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning, "torch.distributed")


@contextmanager
def _local_rank(gpu: int) -> Iterator[None]:
    """Set LOCAL_RANK to the number of this rank's GPU while DeepSpeed starts.

    ZeRO 3 takes the variable for the GPU's number, but SLURM may show each rank only its own GPU; and DeepSpeed asks for
    the variable even where a single process runs without a launcher.
    """
    before = os.environ.get("LOCAL_RANK", "0")
    os.environ["LOCAL_RANK"] = str(gpu)
    try:
        yield
    finally:
        os.environ["LOCAL_RANK"] = before


def wait_on_the_device(zero: Any) -> None:
    """Let the GPU's current stream, not the host, wait for the gradients at the end of a backward pass of ZeRO 1 and 2.

    With overlap_comm DeepSpeed waits there until the whole GPU is idle. But what comes next on the current stream needs the
    reduced gradients and nothing else.
    """
    epilogue = getattr(zero, EPILOGUE, None)
    if epilogue is None:
        _no_longer_there(EPILOGUE)
        return
    accelerator = sys.modules[type(zero).__module__].get_accelerator()

    def without_the_host() -> None:
        accelerator.synchronize = lambda: accelerator.current_stream().wait_stream(zero.reduction_stream)
        try:
            epilogue()
        finally:
            del accelerator.synchronize

    setattr(zero, EPILOGUE, without_the_host)


@contextmanager
def gather_replaced_by(launch: Callable[..., None], zero: Any) -> Iterator[None]:
    """Call `launch` where a step of ZeRO 1 or 2 would gather all weights and wait for them (`zero_gather`)."""
    namespace = sys.modules[type(zero).__module__]
    original = getattr(namespace, GATHER, None)
    setattr(namespace, GATHER, launch)
    try:
        yield
    finally:
        if original is None:
            delattr(namespace, GATHER)
        else:
            setattr(namespace, GATHER, original)


def forget(model: Objective) -> None:
    """Drop DeepSpeed's last references to a model whose engine was destroyed, so that its memory can be freed.

    ZeRO 3 leaves the model on its list of modules whose forward pass runs, and DeepSpeed's cached methods
    (functools.lru_cache) hold the objects that they were called on.
    """
    stack = getattr(sys.modules.get(OFFLOAD), "FWD_MODULE_STACK", [])
    stack[:] = [module for module in stack if module is not model]
    for cached in gc.get_objects():
        if type(cached) is functools._lru_cache_wrapper and cached.__module__.startswith("deepspeed."):
            cached.cache_clear()


@functools.cache  # so that it is logged once
def _no_longer_there(name: str) -> None:
    logger.warning("this version of DeepSpeed has no %s, which fastjepa changes in 0.19.8: it is left as it is", name)
