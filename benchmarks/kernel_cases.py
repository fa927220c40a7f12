"""The shapes that training gives the kernels, and the least work that each operation can do.

`benchmarks.kernels` (times) and `benchmarks.proofs.aot` (compiler's report) share them. Bytes are those that must
cross the memory bus: each input is read once, each output written once. FLOPs are the multiplications and additions
of matrix products. Both follow from the shapes alone, whatever a kernel does.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from fastjepa.config import MODEL_SIZES, DataConfig, ModelSize
from fastjepa.objectives.ijepa.block_sizes import MaskConfig
from fastjepa.objectives.ijepa.masks import MaskBatch, sample_masks
from fastjepa_kernels import MaskRules, Ragged

MEAN, STD = DataConfig().mean, DataConfig().std
"""Mean and standard deviation per channel of the images, for the operations that normalise."""


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
        """The masks that a run with seed 0 samples at step 0, on the CPU."""
        indices = torch.arange(self.batch_size)
        return sample_masks(MaskConfig(), self.grid, self.grid, seed=0, step=0, sample_indices=indices)

    @property
    def mask_rules(self) -> MaskRules:
        """Ragged rules whose blocks have the mean sizes of those that the trainer's defaults draw."""
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
        """Weights in the blocks of the context encoder: nearly all of its parameters."""
        return int(self.size.depth * self.width**2 * (4 + 2 * self.size.mlp_ratio))


def shapes(batch_size: int) -> dict[str, Shape]:
    """Four models by name, at 224 pixels, with the paper's predictor width (appendix A.1)."""
    rows = [
        ("S/16", "vit_small", 16, 14, 384),
        ("B/16", "vit_base", 16, 14, 384),
        ("L/16", "vit_large", 16, 14, 384),
        ("H/14", "vit_huge", 14, 16, 384),
    ]
    return {row[0]: Shape(*row, batch_size) for row in rows}


class Choice(NamedTuple):
    """Selects contests of benchmarks.kernels."""

    ops: list[str]
    shapes: list[str]
    batch_size: int
    dtype: str


@dataclass(frozen=True)
class Work:
    """The least bytes and FLOPs that an operation needs."""

    bytes: int
    flops: int = 0


def attention_forward_work(queries: Ragged, keys: Ragged, num_heads: int, head_dim: int, element_size: int) -> Work:
    """Read q, k, v, write the output and the log-sum-exp (fp32); two products of [queries, head_dim] x [head_dim, keys]."""
    rows = 2 * queries.total + 2 * keys.total
    pairs = int((queries.lengths() * keys.lengths()).sum())
    return Work(
        num_heads * (rows * head_dim * element_size + 4 * queries.total),
        4 * num_heads * pairs * head_dim,
    )


def attention_backward_work(queries: Ragged, keys: Ragged, num_heads: int, head_dim: int, element_size: int) -> Work:
    """Read q, k, v, the output, its gradient and the log-sum-exp, write three gradients; five products."""
    rows = 4 * queries.total + 4 * keys.total
    forward = attention_forward_work(queries, keys, num_heads, head_dim, element_size)
    return Work(num_heads * (rows * head_dim * element_size + 4 * queries.total), forward.flops * 5 // 2)


def linear_work(rows: int, inputs: int, outputs: int, element_size: int) -> Work:
    """Read input, weights and bias, write the output; one product."""
    elements = rows * (inputs + outputs) + outputs * (inputs + 1)
    return Work(elements * element_size, 2 * rows * inputs * outputs)


def linear_backward_work(rows: int, inputs: int, outputs: int, element_size: int) -> Work:
    """Read input, upstream gradient and weights, write three gradients; two products."""
    elements = rows * (2 * inputs + outputs) + outputs * (2 * inputs + 1)
    return Work(elements * element_size, 4 * rows * inputs * outputs)


def gather_work(num_rows: int, width: int, element_size: int, *, index_bytes: int = 8) -> Work:
    """Read and write rows, read their indices."""
    return Work(num_rows * (2 * width * element_size + index_bytes))


def gather_backward_work(num_rows: int, num_sources: int, width: int, element_size: int) -> Work:
    """Read upstream rows and indices, write the gradient of every source row."""
    return Work(num_rows * (width * element_size + 8) + num_sources * width * element_size)


def gather_patches_work(num_rows: int, patch_values: int, pixel_size: int, element_size: int) -> Work:
    """Read the pixels and indices of patches, write their normalised values."""
    return Work(num_rows * (patch_values * (pixel_size + element_size) + 8))


def gather_add_work(num_rows: int, width: int, element_size: int) -> Work:
    """Read and write tokens, read their indices; the position table stays in the cache."""
    return gather_work(num_rows, width, element_size)


def adamw_ema_work(numel: int, *, grad_size: int = 4, copy_size: int = 0) -> Work:
    """Read the gradient, read and write weights, two moments and the average in fp32, write two copies."""
    return Work(numel * (grad_size + 8 * 4 + 2 * copy_size))


def target_loss_work(num_rows: int, width: int, element_size: int) -> Work:
    """Read predictions, target rows and indices, write three fp32 numbers per row."""
    return Work(num_rows * (2 * width * element_size + 8 + 12))


def target_loss_backward_work(num_rows: int, width: int, element_size: int) -> Work:
    """Read predictions, target rows, indices and two fp32 numbers per row, write the gradient."""
    return Work(num_rows * (3 * width * element_size + 8 + 8))


def mask_sampling_work(masks: MaskBatch) -> Work:
    """Read the sample indices, write every index, row number and cumulative length."""
    tensors = [value for value in vars(masks).values() if isinstance(value, Tensor)]
    lengths = [value.cu_seqlens for value in vars(masks).values() if isinstance(value, Ragged)]
    return Work(sum(x.numel() * x.element_size() for x in [*tensors, *lengths]) + 8 * masks.num_images)
