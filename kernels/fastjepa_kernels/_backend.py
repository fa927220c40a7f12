"""Which implementation runs, decided once per kind of input and logged once with its reason."""

from __future__ import annotations

import logging
from functools import cache
from typing import Literal

import torch

logger = logging.getLogger(__name__)

AttentionBackend = Literal["buckets", "varlen", "padded"]


def _flash_attention_takes(dtype: torch.dtype, head_dim: int) -> bool:
    half = dtype in (torch.float16, torch.bfloat16)
    return half and head_dim % 8 == 0 and head_dim <= 256 and torch.cuda.get_device_capability() >= (8, 0)


@cache
def attention_backend(device_type: str, dtype: torch.dtype, head_dim: int) -> AttentionBackend:
    """`buckets`: one SDPA call per length; `varlen`: torch's FlashAttention; `padded`: SDPA with a mask."""
    backend: AttentionBackend
    if device_type == "cpu":
        # The lengths are on the host, so equal ones can be batched; padding costs 1.2-1.9x (PyTorch 2.13, 2 cores).
        backend, reason = "buckets", "lengths are known on the host"
    elif device_type == "cuda" and _flash_attention_takes(dtype, head_dim):
        backend, reason = "varlen", "FlashAttention takes packed sequences of half precision"
    else:
        backend, reason = "padded", "FlashAttention does not take this dtype, head dim or GPU"
    logger.info("block_attention on %s, %s, head dim %d: %s (%s)", device_type, dtype, head_dim, backend, reason)
    return backend
