"""The cost of a training step of I-JEPA, by formula: arithmetic and bytes of activations.

All of it is arithmetic on a `Config`: no model is built and no GPU is looked at. Tests hold it to the real model.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from fastjepa.config import Config
from fastjepa.objectives.ijepa.block_sizes import MaskConfig
from fastjepa.objectives.ijepa.masks import MaskBatch, sample_masks
from fastjepa.objectives.ijepa.settings import PREDICTOR_MLP_RATIO, IJEPAConfig
from fastjepa_kernels import Ragged

_FP32, _BF16 = 4, 2  # bytes


class Tokens(NamedTuple):
    """Tokens per image. The sums of squares are of sequence lengths: attention costs as much."""

    patches: int
    context: float
    context_squares: float
    target: float
    union: float
    predictor: float
    predictor_squares: float
    predictor_target_pairs: float
    """Pairs of a target token and a token of its predictor sequence."""
    predictor_distinct: float
    """Context tokens, plus the mask tokens of all positions, which the images of a micro batch share."""


class MaskLengths(NamedTuple):
    """The lengths of a micro batch's sequences: its masks without their indices."""

    images: int
    patches: int
    context: Ragged
    target: Ragged
    union: Ragged
    predictor: Ragged

    @staticmethod
    def of(masks: MaskBatch) -> MaskLengths:
        return MaskLengths(
            masks.num_images,
            masks.num_patches,
            masks.context_lengths,
            masks.target_lengths,
            masks.union_lengths,
            masks.predictor_lengths,
        )

    def tokens(self) -> Tokens:
        """Reads the lengths back from the device."""
        context, target, predictor = (x.cu_seqlens.diff().double() for x in (self.context, self.target, self.predictor))
        sums: list[torch.Tensor | int] = [
            context.sum(), (context**2).sum(), target.sum(), self.union.total,
            predictor.sum(), (predictor**2).sum(), (predictor * target).sum(), self.context.total + self.patches,
        ]  # fmt: skip
        return Tokens(self.patches, *(float(x) / self.images for x in sums))


@functools.lru_cache
def sample_tokens(masks: MaskConfig, grid_h: int, grid_w: int) -> tuple[Tokens, Tokens]:
    """The mean over 64 steps, and the step with the largest predictor, from the sampler itself.

    Block sizes are drawn per step, so some steps are heavier than others.
    """
    steps, indices = 64, torch.arange(128)
    batches = (sample_masks(masks, grid_h, grid_w, seed=0, step=step, sample_indices=indices) for step in range(steps))
    sampled = [MaskLengths.of(batch).tokens() for batch in batches]
    mean = Tokens(grid_h * grid_w, *(sum(column) / steps for column in list(zip(*sampled, strict=True))[1:]))
    return mean, max(sampled, key=lambda tokens: tokens.predictor)


class Flops(NamedTuple):
    """FLOPs of the forward pass per image: matrix products only; a multiplication and an addition count as two."""

    target: float
    context: float
    predictor: float
    ends: float
    """Embedding and projection of the predictor, which are never recomputed."""
    embedding: float
    """Patch embedding of the context encoder, which is not recomputed either; pixels need no gradient."""


def forward_flops(config: Config, tokens: Tokens) -> Flops:
    size, settings = config.model.size, IJEPAConfig.of(config)
    width, savings, depth = (
        settings.predictor_embed_dim,
        settings.savings,
        settings.depth_of_predictor(config.model.name),
    )
    dim, ratio, patches = size.embed_dim, size.mlp_ratio, tokens.patches

    def blocks(dim: int, ratio: float, count: int, tokens: float, squares: float) -> float:
        return count * (2 * dim * dim * (4 + 2 * ratio) * tokens + 4 * dim * squares)

    def last(dim: int, ratio: float, tokens: float, asking: float, pairs: float) -> float:
        return 2 * dim * dim * (2 * tokens + (2 + 2 * ratio) * asking) + 4 * dim * pairs

    pixels = config.data.in_channels * config.model.patch_size**2
    target = 2 * pixels * dim * patches + blocks(dim, ratio, size.depth - 1, patches, patches**2)
    asking = tokens.union if savings.target_last_block else patches
    target += last(dim, ratio, patches, asking, asking * patches)
    embedded = tokens.context if savings.gather_before_embed else patches
    context = blocks(dim, ratio, size.depth, tokens.context, tokens.context_squares)
    predictor = blocks(width, PREDICTOR_MLP_RATIO, depth - 1, tokens.predictor, tokens.predictor_squares)
    if savings.predictor_first_block:  # QKV of distinct tokens; of the last block, KV
        products = 4 if depth == 1 and savings.predictor_last_block else 6
        predictor -= products * width * width * (tokens.predictor - tokens.predictor_distinct)
    if savings.predictor_last_block:
        predictor += last(width, PREDICTOR_MLP_RATIO, tokens.predictor, tokens.target, tokens.predictor_target_pairs)
    else:
        predictor += blocks(width, PREDICTOR_MLP_RATIO, 1, tokens.predictor, tokens.predictor_squares)
    ends = 2 * dim * width * (tokens.context + tokens.target)
    return Flops(target, context, predictor, ends, 2 * dim * pixels * embedded)


def step_flops(config: Config, tokens: Tokens, *, recomputed: bool = True) -> float:
    """FLOPs of one training step per image: target forward, three times context and predictor (four if recomputed).

    Args:
        recomputed: count what activation checkpointing computes again. Utilisation (MFU) is reckoned without it.
    """
    forward = forward_flops(config, tokens)
    passes = 4 if config.model.activation_checkpointing and recomputed else 3
    return forward.target + passes * (forward.context + forward.predictor) + 3 * forward.ends + 2 * forward.embedding


def kept_bytes(config: Config, tokens: Tokens, *, bf16: bool, autocast: bool) -> float:
    """Bytes of activations per image that are kept for the backward pass.

    A block keeps, per token and in units of the width: its input, norm1, q, k, v, the attention's output, the sum, norm2,
    and the MLP's hidden layer before and after GELU, 8 + 2 ratio in all; statistics of LayerNorm and softmax in fp32.
    With activation checkpointing, the inputs of the blocks alone.
    """
    size, settings = config.model.size, IJEPAConfig.of(config)
    width, savings, depth = (
        settings.predictor_embed_dim,
        settings.savings,
        settings.depth_of_predictor(config.model.name),
    )
    dim, ratio = size.embed_dim, size.mlp_ratio
    low = _BF16 if bf16 else _FP32
    residual = _FP32 if autocast else low  # under autocast LayerNorm reads and writes fp32
    statistics = _FP32 * (4 + size.num_heads)

    def block(dim: int, ratio: float, tokens: float) -> float:
        return tokens * (2 * residual * dim + low * (6 + 2 * ratio) * dim + statistics)

    def last(dim: int, ratio: float, tokens: float, asking: float) -> float:
        """All tokens are keys, some ask."""
        keys = tokens * dim * (residual + 3 * low)
        return keys + asking * (dim * (residual + low * (4 + 2 * ratio)) + statistics)

    context = [block(dim, ratio, tokens.context)] * size.depth
    predictor = [block(width, PREDICTOR_MLP_RATIO, tokens.predictor)] * depth
    if savings.predictor_first_block and depth > 1:
        predictor[0] -= (tokens.predictor - tokens.context) * width * (residual + low)
    if savings.predictor_last_block:
        predictor[-1] = last(width, PREDICTOR_MLP_RATIO, tokens.predictor, tokens.target)
    pixels = config.data.in_channels * config.model.patch_size**2
    embedded = tokens.context if savings.gather_before_embed else tokens.patches
    ends = embedded * low * pixels + tokens.context * dim * (residual + low)
    features = tokens.union if savings.target_last_block else tokens.patches
    ends += tokens.target * (width * (residual + low) + low * dim) + features * low * dim
    if not config.model.activation_checkpointing:
        return sum(context) + sum(predictor) + ends
    rows = depth * tokens.predictor
    if savings.predictor_first_block:
        rows -= tokens.predictor - tokens.context
    return residual * (size.depth * dim * tokens.context + width * rows) + ends


def activation_bytes(config: Config, tokens: Tokens, *, bf16: bool, autocast: bool) -> float:
    """Bytes of activations per image at the worst moment of a step.

    That is either what is kept plus the gradients within one block's MLP (with activation checkpointing, within one whole
    block), or the forward pass of the target encoder.
    """
    size, width = config.model.size, IJEPAConfig.of(config).predictor_embed_dim
    low, dim, ratio = _BF16 if bf16 else _FP32, size.embed_dim, size.mlp_ratio
    kept = kept_bytes(config, tokens, bf16=bf16, autocast=autocast)
    block = (2 + 2 * ratio, 10) if not config.model.activation_checkpointing else (10 + 4 * ratio, 26)
    working = low * max(block[0] * dim * tokens.context, block[1] * width * tokens.predictor)
    return max(kept + working, low * (5 + 2 * ratio) * dim * tokens.patches)
