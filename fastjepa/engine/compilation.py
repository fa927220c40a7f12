"""torch.compile of the transformer blocks: bias, GELU, LayerNorm, residual and casts fused between the matrix products.

A block is compiled, not the model: blocks of the same shape class (context encoder, target encoder and its last block,
first, middle and last block of the predictor) share a graph, so that six are compiled, whatever the depth. Numbers of
tokens are symbols in them: batches of other lengths need no new graph. The operations of fastjepa_kernels are opaque in a
graph. What waits for weights (`zero_gather`) or computes a block again (activation checkpointing) stands outside.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastjepa.config import Config
from fastjepa.errors import ConfigError
from fastjepa.models.layers import Block
from fastjepa_kernels import Operation
from fastjepa_kernels.selection import triton_problem

logger = logging.getLogger(__name__)

_MAX_GRAPHS = 16
"""Graphs of a block at most: more than there are shape classes in training and evaluation. More would mean a fault, which is
then an error and not a slow run."""


def compiles_blocks(
    config: Config, operations: Sequence[Operation], device: torch.device, zero_stage: int | None
) -> bool:
    """Decide whether the blocks are compiled. The answer is logged, with the reason if they are not.

    Args:
        config: `compile` is what is asked for.
        operations: that blocks call.
        zero_stage: of DeepSpeed; None: plain PyTorch.

    Raises:
        ConfigError: it is asked for, and cannot be.
    """
    if config.compile == "none":
        return False
    problem = _problem(config, operations, device, zero_stage)
    if config.compile == "auto" and device.type != "cuda":
        problem = "on a CPU it gains nothing"
    if problem and config.compile != "auto":
        raise ConfigError(f"compile = {config.compile}: {problem}; use compile=none")
    what = "blocks" if config.compile == "auto" else config.compile
    logger.info("compile: %s", f"none ({problem})" if problem else what)
    return problem is None


def _problem(
    config: Config, operations: Sequence[Operation], device: torch.device, zero_stage: int | None
) -> str | None:
    if config.compile == "cuda_graphs" and (device.type != "cuda" or zero_stage is not None):
        return "CUDA graphs are for plain PyTorch (no --ds_config) on a GPU"
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) < (7, 0):
            return "on a GPU it needs compute capability 7.0 or newer"
        if problem := triton_problem():
            return problem
    if zero_stage == 3:
        return "ZeRO 3 gathers weights between the layers of a block"
    for operation in operations:
        if operation.name == "block_attention" and operation.choose(device.type) in ("buckets", "xformers"):
            attention = operation.choose(device.type)
            return f"kernels.block_attention = {attention} cannot be part of a compiled graph"
    return None


def compile_blocks(model: nn.Module, backend: str = "inductor", *, may_give_up: bool = False) -> None:
    """Have the blocks within the model compute compiled: their `compute` alone, not the modules' hooks.

    Args:
        model: any module with Blocks inside, which share their graphs.
        backend: of torch.compile.
        may_give_up: if the compiler fails, the blocks compute as they did before, which is logged; else that is an error.
    """
    compiled = torch.compile(  # type: ignore[call-overload]  # which misses the two last arguments
        Block.compute,
        fullgraph=True,
        dynamic=True,
        backend=backend,
        recompile_limit=_MAX_GRAPHS,
        isolate_recompiles=True,
    )
    blocks = [module for module in model.modules() if isinstance(module, Block)]

    def compiled_or_plain(block: Block, *args: Any, **kwargs: Any) -> Tensor:
        from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException  # loaded by torch.compile anyway

        try:
            out: Tensor = compiled(block, *args, **kwargs)
            return out
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:
            logger.warning(
                "compile: none from here on: PyTorch's compiler failed (%s: %s)", type(error).__name__, error
            )
        for other in blocks:
            other.compute_with(Block.compute)
        return block.compute(*args, **kwargs)

    for block in blocks:
        block.compute_with(compiled_or_plain if may_give_up else compiled)
