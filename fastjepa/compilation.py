"""torch.compile of the transformer blocks: bias, GELU, LayerNorm, residual and casts fused between the matrix products.

A block is compiled, not the model: blocks of the same shape class (context encoder, target encoder and its last block,
first, middle and last block of the predictor) share a graph, so that six are compiled, whatever the depth. Numbers of
tokens are symbols in them: batches of other lengths need no new graph. The operations of fastjepa_kernels are opaque in a
graph. What waits for weights (fastjepa.zero_gather) or computes a block again (activation checkpointing) stands outside.
"""

from __future__ import annotations

import logging
from importlib.util import find_spec
from types import MethodType

import torch
from torch import nn

import fastjepa_kernels
from fastjepa.config import Config
from fastjepa.errors import ConfigError
from fastjepa.models.layers import Block

logger = logging.getLogger(__name__)

_MAX_GRAPHS = 16
"""More than there are shape classes, in training and evaluation. What would need more is an error, not a slow run."""


def compiles_blocks(config: Config, device: torch.device, dtype: torch.dtype, zero_stage: int | None) -> bool:
    """Whether the blocks are to be compiled, which is logged, with the reason if they are not.

    Args:
        config: `compile` is what is asked for.
        device, dtype: in which blocks compute.
        zero_stage: of DeepSpeed; None: plain PyTorch.

    Raises:
        ConfigError: it is asked for, and cannot be.
    """
    if config.compile == "none":
        return False
    problem = _problem(config, device, dtype, zero_stage)
    if config.compile == "auto" and device.type != "cuda":
        problem = "on a CPU it gains nothing"
    if problem and config.compile != "auto":
        raise ConfigError(f"compile = {config.compile}: {problem}; use compile=none")
    what = "blocks" if config.compile == "auto" else config.compile
    logger.info("compile: %s", f"none ({problem})" if problem else what)
    return problem is None


def _problem(config: Config, device: torch.device, dtype: torch.dtype, zero_stage: int | None) -> str | None:
    if config.compile == "cuda_graphs" and (device.type != "cuda" or zero_stage is not None):
        return "CUDA graphs are for plain PyTorch (no --ds_config) on a GPU"
    if device.type == "cuda" and (find_spec("triton") is None or torch.cuda.get_device_capability(device) < (7, 0)):
        return "on a GPU it needs triton and compute capability 7.0 or newer"
    if zero_stage == 3:
        return "ZeRO 3 gathers weights between the layers of a block"
    size = config.model.size
    for width in (size.embed_dim, config.model.predictor_embed_dim):
        attention = fastjepa_kernels.choose("block_attention", device.type, dtype, width // size.num_heads)
        if attention in ("buckets", "xformers"):
            return f"kernels.block_attention = {attention} cannot be part of a compiled graph"
    return None


def compile_blocks(model: nn.Module, backend: str = "inductor") -> None:
    """From now on the blocks within the model compute compiled: their `forward` alone, not the modules' hooks.

    Args:
        model: any module with Blocks inside, which share their graphs.
        backend: of torch.compile.
    """
    forward = torch.compile(  # type: ignore[call-overload]  # which misses the two last arguments
        Block.forward,
        fullgraph=True,
        dynamic=True,
        backend=backend,
        recompile_limit=_MAX_GRAPHS,
        isolate_recompiles=True,
    )
    for block in model.modules():
        if isinstance(block, Block):
            block.forward = MethodType(forward, block)  # type: ignore[method-assign]
