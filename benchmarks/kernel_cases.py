"""The shapes that training gives the kernels, and the least work that each operation can do: shared by all benchmarks.

Bytes are those that must cross the memory bus once, each input read and each output written; FLOPs are multiplications and
additions of matrix products. Both are formulas of the shapes, independent of how a kernel does it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from fastjepa.config import MODEL_SIZES, MaskConfig, ModelSize
from fastjepa.objectives.ijepa.masks import MaskBatch, sample_masks
from fastjepa_kernels import MaskRules, Ragged


@dataclass(frozen=True)
class Shape:
    """One model on one image size, with the masks of one batch."""

    name: str
    model: str
    patch_size: int
    grid: int
    predictor_width: int
    batch_size: int

    @property
    def size(self) -> ModelSize:
        return MODEL_SIZES[self.model]

    @property
    def width(self) -> int:
        return self.size.embed_dim

    @property
    def num_heads(self) -> int:
        return self.size.num_heads

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads

    @property
    def predictor_head_dim(self) -> int:
        return self.predictor_width // self.num_heads

    @property
    def num_patches(self) -> int:
        return self.grid**2

    @property
    def image_size(self) -> int:
        return self.grid * self.patch_size

    @cached_property
    def masks(self) -> MaskBatch:
        """Sampled as a run does, on the CPU: seed 0, step 0."""
        indices = torch.arange(self.batch_size)
        return sample_masks(MaskConfig(), self.grid, self.grid, seed=0, step=0, sample_indices=indices)

    @property
    def mask_rules(self) -> MaskRules:
        """As the trainer's defaults draw them: the mean sizes of its blocks, in ragged mode."""
        target, context = (round((share * self.num_patches) ** 0.5) for share in (0.175, 0.925))
        return MaskRules(
            strategy="multiblock",
            mode="ragged",
            grid_h=self.grid,
            grid_w=self.grid,
            reach_h=self.grid,
            reach_w=self.grid,
            target_h=target,
            target_w=target,
            context_h=context,
            context_w=context,
            target_count=target**2,
            num_target_blocks=4,
            min_context=11,
        )

    @property
    def encoder_params(self) -> int:
        """Of the context encoder, nearly: the weights of its blocks."""
        return int(self.size.depth * self.width**2 * (4 + 2 * self.size.mlp_ratio))


def shapes(batch_size: int) -> dict[str, Shape]:
    """By name. A predictor as wide as the paper's (appendix A.1), at 224 pixels."""
    rows = [
        ("S/16", "vit_small", 16, 14, 384),
        ("B/16", "vit_base", 16, 14, 384),
        ("L/16", "vit_large", 16, 14, 384),
        ("H/14", "vit_huge", 14, 16, 384),
    ]
    return {row[0]: Shape(*row, batch_size) for row in rows}


class Choice(NamedTuple):
    """Which contests of benchmarks.kernels."""

    ops: list[str]
    shapes: list[str]
    batch_size: int
    dtype: str


@dataclass(frozen=True)
class Work:
    """The least that an operation can do."""

    bytes: int
    flops: int = 0


def attention_forward_work(queries: Ragged, keys: Ragged, num_heads: int, head_dim: int, element_size: int) -> Work:
    """q, k, v read, out written, log-sum-exp (fp32) written; two products of [queries, head_dim] x [head_dim, keys]."""
    rows = 2 * queries.total + 2 * keys.total
    pairs = int((queries.lengths() * keys.lengths()).sum())
    return Work(
        num_heads * (rows * head_dim * element_size + 4 * queries.total),
        4 * num_heads * pairs * head_dim,
    )


def attention_backward_work(queries: Ragged, keys: Ragged, num_heads: int, head_dim: int, element_size: int) -> Work:
    """q, k, v, out, its gradient and the log-sum-exp read, three gradients written; five products."""
    rows = 4 * queries.total + 4 * keys.total
    forward = attention_forward_work(queries, keys, num_heads, head_dim, element_size)
    return Work(num_heads * (rows * head_dim * element_size + 4 * queries.total), forward.flops * 5 // 2)


def linear_work(rows: int, inputs: int, outputs: int, element_size: int) -> Work:
    """Input, weights and bias read, output written."""
    elements = rows * (inputs + outputs) + outputs * (inputs + 1)
    return Work(elements * element_size, 2 * rows * inputs * outputs)


def linear_backward_work(rows: int, inputs: int, outputs: int, element_size: int) -> Work:
    """Input, its upstream gradient and weights read, three gradients written; two products."""
    elements = rows * (2 * inputs + outputs) + outputs * (2 * inputs + 1)
    return Work(elements * element_size, 4 * rows * inputs * outputs)


def gather_work(num_rows: int, width: int, element_size: int, *, index_bytes: int = 8) -> Work:
    """Rows read and written, and their indices."""
    return Work(num_rows * (2 * width * element_size + index_bytes))


def gather_backward_work(num_rows: int, num_sources: int, width: int, element_size: int) -> Work:
    """Upstream rows and indices read, every source row's gradient written."""
    return Work(num_rows * (width * element_size + 8) + num_sources * width * element_size)


def gather_patches_work(num_rows: int, patch_values: int, pixel_size: int, element_size: int) -> Work:
    return Work(num_rows * (patch_values * (pixel_size + element_size) + 8))


def gather_add_work(num_rows: int, width: int, element_size: int) -> Work:
    """Tokens read and written; the position table stays in the cache."""
    return gather_work(num_rows, width, element_size)


def adamw_ema_work(numel: int, *, grad_size: int = 4, copy_size: int = 0) -> Work:
    """Gradient read; weights, two moments and the average read and written in fp32; two copies written."""
    return Work(numel * (grad_size + 8 * 4 + 2 * copy_size))


def target_loss_work(num_rows: int, width: int, element_size: int) -> Work:
    """Predictions and target rows read, indices read, three fp32 numbers per row written."""
    return Work(num_rows * (2 * width * element_size + 8 + 12))


def target_loss_backward_work(num_rows: int, width: int, element_size: int) -> Work:
    """Predictions and target rows read again, the gradient written."""
    return Work(num_rows * (3 * width * element_size + 8 + 8))


def mask_sampling_work(masks: MaskBatch) -> Work:
    """Every index, row number and cumulative length written; nothing to read but the sample indices."""
    tensors = [value for value in vars(masks).values() if isinstance(value, Tensor)]
    lengths = [value.cu_seqlens for value in vars(masks).values() if isinstance(value, Ragged)]
    return Work(sum(x.numel() * x.element_size() for x in [*tensors, *lengths]) + 8 * masks.num_images)
