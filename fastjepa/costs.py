"""What a training step costs, by formula: parameters, state and activation bytes, bytes sent, arithmetic.

The formulas describe what the code and DeepSpeed 0.19.8 do with `configs/zero0.json` to `zero3.json`, not what the papers on
ZeRO say that they could; `python -m benchmarks.bytes` measures the state and the bytes sent, and tests hold the rest to the
real model. All of it is arithmetic on a `Config`: no model is built and no GPU is looked at.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from fastjepa.config import Config, MaskConfig
from fastjepa.masks import MaskBatch, sample_masks
from fastjepa_kernels import Ragged

Stage = Literal["torch", 0, 1, 2, 3]
"""Plain PyTorch, or a ZeRO stage."""
STAGES: tuple[Stage, ...] = ("torch", 0, 1, 2, 3)

FP32, BF16 = 4, 2


@dataclass(frozen=True)
class ZeroSettings:
    """What of `configs/zeroN.json`, and of DeepSpeed's defaults, decides about bytes. All are numbers of elements."""

    reduce_bucket_size: int = 50_000_000
    reduce_bucket_size_stage0: int = 500_000_000
    stage3_param_persistence_threshold: int = 100_000
    """Smaller parameters are whole on every rank."""
    stage3_max_reuse_distance: int = 1_000_000_000
    """A parameter that is used again before as many elements went by is not given back in between."""
    stage3_prefetch_bucket_size: int = 50_000_000


ZERO_SETTINGS = ZeroSettings()


# Parameters


@functools.lru_cache
def parameter_sizes(config: Config) -> dict[str, list[int]]:
    """Parameter group (as in `fastjepa.optim.param_groups`) -> elements of each of its parameters."""
    size, width = config.model.size, config.model.predictor_embed_dim

    def vit(dim: int, depth: int, hidden: int) -> tuple[list[int], list[int]]:
        matrices = [3 * dim * dim, dim * dim, dim * hidden, hidden * dim]
        vectors = [dim, dim, 3 * dim, dim, dim, dim, hidden, dim]  # norm1, qkv, proj, norm2, fc1, fc2
        return matrices * depth, vectors * depth + [dim, dim]

    dim = size.embed_dim
    decay, no_decay = vit(dim, size.depth, round(dim * size.mlp_ratio))
    decay, no_decay = [config.data.in_channels * config.model.patch_size**2 * dim, *decay], [dim, *no_decay]
    narrow, narrow_vectors = vit(width, size.predictor_depth, 4 * width)
    return {
        "encoder_decay": decay,
        "encoder_no_decay": no_decay,
        # mask_token, predictor_embed, blocks, predictor_proj
        "predictor_decay": [width, dim * width, *narrow, width * dim],
        "predictor_no_decay": [width, *narrow_vectors, dim],
        "target_decay": decay,
        "target_no_decay": no_decay,
    }


def count_parameters(config: Config) -> tuple[int, int]:
    """Parameters of the encoder (the target encoder has as many) and of the predictor."""
    sizes = {group: sum(numels) for group, numels in parameter_sizes(config).items()}
    return sizes["encoder_decay"] + sizes["encoder_no_decay"], sizes["predictor_decay"] + sizes["predictor_no_decay"]


def _shares(numels: list[int], stage: Stage, gpus: int) -> int:
    """Elements of a parameter group that a rank holds of what is sharded, with DeepSpeed's padding."""
    total = sum(numels)
    if stage == "torch":
        return -(-total // 16) * 16  # one flat buffer (fastjepa.optim.flatten_groups)
    if stage == 0:
        return total
    if stage == 3:
        return sum(-(-numel // gpus) for numel in numels)  # parameter by parameter
    return -(-total // (2 * gpus)) * 2  # one flat buffer, aligned to two elements a rank


# State


@dataclass(frozen=True)
class State:
    """Bytes on one rank."""

    weights: int
    """Model weights as the forward pass reads them, target encoder included."""
    gradients: int
    """While they are summed up over micro batches."""
    masters: int
    """fp32 weights, where the model's own are bf16."""
    ema: int
    """fp32 average, where it is not the target encoder's weights themselves."""
    moments: int
    buckets: int
    """Buffers that DeepSpeed keeps for sending gradients."""
    passing: int
    """At the worst moment of a step: gathered weights, copies of autocast, fp32 gradients of a group at its update."""

    @property
    def resident(self) -> int:
        return self.weights + self.gradients + self.masters + self.ema + self.moments + self.buckets

    @property
    def peak(self) -> int:
        return self.resident + self.passing


def state_bytes(
    config: Config, stage: Stage, gpus: int, *, bf16: bool = True, zero: ZeroSettings = ZERO_SETTINGS
) -> State:
    """State of one rank (the largest share) between two micro batches of a step, and what comes on top for a moment."""
    sizes = parameter_sizes(config)
    held = {group: _shares(numels, stage, gpus) for group, numels in sizes.items()}
    all_held = sum(held.values())
    targets = held["target_decay"] + held["target_no_decay"]
    trained = all_held - targets
    copies = BF16 if bf16 else 0
    if stage in ("torch", 0):
        # Stage 0 tells DeepSpeed that the target needs no gradient, and autocast keeps no copies of such weights.
        passing = copies * (all_held if stage == "torch" else trained)
        if stage == 0 and gpus > 1:
            passing += FP32 * min(trained, zero.reduce_bucket_size_stage0)
        return State(FP32 * all_held, FP32 * trained, 0, 0, 2 * FP32 * trained, 0, passing)
    low = BF16 if bf16 else FP32
    at_update = FP32 * max(held.values())  # one group at a time, in fp32
    if stage == 3:
        persistent = live = 0
        if gpus > 1:  # alone, a rank computes with its shares, which are whole
            persistent = sum(
                n for numels in sizes.values() for n in numels if n <= zero.stage3_param_persistence_threshold
            )
            whole = sum(map(sum, sizes.values()))
            live = min(_kept(config, zero) + zero.stage3_prefetch_bucket_size, whole) - persistent
        weights = low * (all_held + persistent)
        gradients = low * all_held
        buckets, passing = low * zero.reduce_bucket_size, max(low * live, at_update)
    else:
        weights = low * gpus * all_held  # whole, with the padding
        buckets, passing = 2 * low * zero.reduce_bucket_size, at_update
        if stage == 1:
            gradients = low * sum(count_parameters(config))
        else:
            gradients = low * _whole_parameters(sizes, gpus)
            buckets, passing = 0, max(buckets, at_update)  # held during a backward pass only
    return State(weights, gradients, FP32 * trained, FP32 * targets, 2 * FP32 * trained, buckets, passing)


def _whole_parameters(sizes: dict[str, list[int]], gpus: int) -> int:
    """Elements of gradients that a rank holds at stage 2; the largest of the ranks.

    A parameter of which a rank's share holds a part is kept whole. For the target's, whose gradients never come, there are
    a place and zeros.
    """
    held = [0] * gpus
    for group, numels in sizes.items():
        share, start = _shares(numels, 2, gpus), 0
        for numel in numels:
            for rank in range(start // share, (start + numel - 1) // share + 1):
                held[rank] += numel * (2 if group.startswith("target") else 1)
            start += numel
    return max(held)


def _kept(config: Config, zero: ZeroSettings) -> int:
    """Elements of context encoder and predictor that stage 3 keeps whole from their forward pass to their backward pass.

    Whoever is used last is used again first: between the two uses of a parameter, those behind it go by twice.
    """
    return min(sum(count_parameters(config)), zero.stage3_max_reuse_distance // 2)


# Bytes sent


class Traffic(NamedTuple):
    """Bytes that one rank sends in an optimizer step, by rings: an all-reduce of n bytes sends 2 (N-1)/N n, an all-gather
    or a reduce-scatter (N-1)/N n."""

    gradients: float
    weights: float
    """All-gathers, the target encoder's included."""

    @property
    def total(self) -> float:
        return self.gradients + self.weights


def bytes_sent(
    config: Config, stage: Stage, gpus: int, accum: int, *, bf16: bool = True, zero: ZeroSettings = ZERO_SETTINGS
) -> Traffic:
    """What DeepSpeed sends with our settings; some bytes of norms and flags are left out.

    Stages 1 and 2 all-reduce whole gradient buckets (a rank keeps its share of the result), stage 2 and 3 after every micro
    batch. Stage 3 gathers small parameters once a step, and large ones as they are used: the target encoder's and most of
    the others once per micro batch, those that are given back before their backward pass twice.
    """
    sizes = parameter_sizes(config)
    ring = (gpus - 1) / gpus
    encoder, predictor = count_parameters(config)
    trained = encoder + predictor
    if stage == "torch":
        padded = sum(_shares(sizes[g], stage, gpus) for g in sizes if not g.startswith("target"))
        return Traffic(2 * ring * FP32 * padded, 0.0)
    if stage == 0:
        return Traffic(2 * ring * FP32 * trained, 0.0)
    low = BF16 if bf16 else FP32
    if stage in (1, 2):
        reduced = trained * (accum if stage == 2 else 1)
        gathered = gpus * sum(_shares(numels, stage, gpus) for numels in sizes.values())
        return Traffic(2 * ring * low * reduced, ring * low * gathered)
    large = {g: [n for n in numels if n > zero.stage3_param_persistence_threshold] for g, numels in sizes.items()}
    small = {g: [n for n in numels if n <= zero.stage3_param_persistence_threshold] for g, numels in sizes.items()}
    padded_small, padded_large, padded_all = (
        gpus * sum(_shares(numels, 3, gpus) for numels in part.values()) for part in (small, large, sizes)
    )
    again = max(0, sum(sum(n) for g, n in large.items() if not g.startswith("target")) - _kept(config, zero))
    padded_target = gpus * (_shares(sizes["target_decay"], 3, gpus) + _shares(sizes["target_no_decay"], 3, gpus))
    return Traffic(
        ring * low * accum * (padded_all - padded_target), ring * low * (padded_small + accum * (padded_large + again))
    )


def waited_collectives(config: Config, stage: Stage) -> int:
    """Collectives that a step waits for one after the other, however little they send.

    Norms of the parameter groups, and weights of the context encoder's; at stage 3 every small parameter, which DeepSpeed
    gathers by itself.
    """
    sizes, zero = parameter_sizes(config), ZERO_SETTINGS
    if stage == "torch":
        return sum(not group.startswith("target") for group in sizes)
    if stage == 0:
        return -(-sum(count_parameters(config)) // zero.reduce_bucket_size_stage0)
    if stage == 3:
        small = (n <= zero.stage3_param_persistence_threshold for numels in sizes.values() for n in numels)
        return len(sizes) + sum(small)
    return len(sizes) + 2


def bytes_sent_theory(config: Config, stage: Stage, gpus: int, accum: int, *, bf16: bool = True) -> Traffic:
    """What the stage could do with: stages 1 and 2 reduce-scatter, each weight is gathered once per use (forward and
    backward of context encoder and predictor, forward of the target encoder), nothing is padded."""
    encoder, predictor = count_parameters(config)
    trained, everything = encoder + predictor, 2 * encoder + predictor
    ring, low = (gpus - 1) / gpus, BF16 if bf16 else FP32
    if stage in ("torch", 0):
        return Traffic(2 * ring * FP32 * trained, 0.0)
    if stage == 1:
        return Traffic(ring * low * trained, ring * low * everything)
    if stage == 2:
        return Traffic(ring * low * trained * accum, ring * low * everything)
    return Traffic(ring * low * trained * accum, ring * low * accum * (2 * trained + encoder))


# Tokens, arithmetic, activations


class Tokens(NamedTuple):
    """Per image. The sums of squares are of sequence lengths: what attention costs."""

    patches: int
    context: float
    context_squares: float
    target: float
    union: float
    predictor: float
    predictor_squares: float
    predictor_target_pairs: float
    """Pairs of a target token and a token of its sequence."""
    predictor_distinct: float
    """Context tokens, and the mask tokens of all positions, which the images of a micro batch share."""


class Lengths(NamedTuple):
    """What the arithmetic of a micro batch depends on: its masks without their indices."""

    images: int
    patches: int
    context: Ragged
    target: Ragged
    union: Ragged
    predictor: Ragged

    @staticmethod
    def of(masks: MaskBatch) -> Lengths:
        return Lengths(masks.num_images, masks.num_patches, masks.context, masks.target, masks.union, masks.predictor)

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
    """Mean over 64 steps, and the step with the largest predictor, from the sampler itself: block sizes are drawn per
    step, so some steps are heavier than others."""
    steps, indices = 64, torch.arange(128)
    batches = (sample_masks(masks, grid_h, grid_w, seed=0, step=step, sample_indices=indices) for step in range(steps))
    sampled = [Lengths.of(batch).tokens() for batch in batches]
    mean = Tokens(grid_h * grid_w, *(sum(column) / steps for column in list(zip(*sampled, strict=True))[1:]))
    return mean, max(sampled, key=lambda tokens: tokens.predictor)


class Flops(NamedTuple):
    """Of the forward pass, per image: matrix products only; a multiplication and an addition count as two."""

    target: float
    context: float
    predictor: float
    ends: float
    """Embedding and projection of the predictor: never recomputed."""
    embedding: float
    """Of the context encoder: nor that, and pixels need no gradient."""


def forward_flops(config: Config, tokens: Tokens) -> Flops:
    size, width, savings = config.model.size, config.model.predictor_embed_dim, config.objective.savings
    dim, ratio, patches = size.embed_dim, size.mlp_ratio, tokens.patches

    def blocks(dim: int, ratio: float, depth: int, tokens: float, squares: float) -> float:
        return depth * (2 * dim * dim * (4 + 2 * ratio) * tokens + 4 * dim * squares)

    def last(dim: int, ratio: float, tokens: float, asking: float, pairs: float) -> float:
        return 2 * dim * dim * (2 * tokens + (2 + 2 * ratio) * asking) + 4 * dim * pairs

    pixels = config.data.in_channels * config.model.patch_size**2
    target = 2 * pixels * dim * patches + blocks(dim, ratio, size.depth - 1, patches, patches**2)
    asking = tokens.union if savings.target_last_block else patches
    target += last(dim, ratio, patches, asking, asking * patches)
    embedded = tokens.context if savings.gather_before_embed else patches
    context = blocks(dim, ratio, size.depth, tokens.context, tokens.context_squares)
    predictor = blocks(width, 4.0, size.predictor_depth - 1, tokens.predictor, tokens.predictor_squares)
    if savings.predictor_first_block:  # QKV of distinct tokens; of the last block, KV
        products = 4 if size.predictor_depth == 1 and savings.predictor_last_block else 6
        predictor -= products * width * width * (tokens.predictor - tokens.predictor_distinct)
    if savings.predictor_last_block:
        predictor += last(width, 4.0, tokens.predictor, tokens.target, tokens.predictor_target_pairs)
    else:
        predictor += blocks(width, 4.0, 1, tokens.predictor, tokens.predictor_squares)
    ends = 2 * dim * width * (tokens.context + tokens.target)
    return Flops(target, context, predictor, ends, 2 * dim * pixels * embedded)


def flops_per_image(config: Config, tokens: Tokens, *, recomputed: bool = True) -> float:
    """Of one training step: target forward, three times context and predictor (four with activation checkpointing).

    Args:
        recomputed: count what activation checkpointing computes again. Utilisation (MFU) is reckoned without it.
    """
    forward = forward_flops(config, tokens)
    passes = 4 if config.model.activation_checkpointing and recomputed else 3
    return forward.target + passes * (forward.context + forward.predictor) + 3 * forward.ends + 2 * forward.embedding


def kept_bytes(config: Config, tokens: Tokens, stage: Stage, *, bf16: bool = True) -> float:
    """Activations that are kept for the backward pass, per image.

    A block keeps, per token and in units of the width: its input, norm1, q, k, v, the attention's output, the sum, norm2,
    and the MLP's hidden layer before and after GELU, 8 + 2 ratio in all; statistics of LayerNorm and softmax in fp32.
    With activation checkpointing, the inputs of the blocks alone.
    """
    size, width, savings = config.model.size, config.model.predictor_embed_dim, config.objective.savings
    dim, ratio = size.embed_dim, size.mlp_ratio
    low = BF16 if bf16 else FP32
    residual = FP32 if bf16 and stage in ("torch", 0) else low  # autocast: LayerNorm reads and writes fp32
    statistics = FP32 * (4 + size.num_heads)

    def block(dim: int, ratio: float, tokens: float) -> float:
        return tokens * (2 * residual * dim + low * (6 + 2 * ratio) * dim + statistics)

    def last(dim: int, ratio: float, tokens: float, asking: float) -> float:
        """All tokens are keys, some ask."""
        keys = tokens * dim * (residual + 3 * low)
        return keys + asking * (dim * (residual + low * (4 + 2 * ratio)) + statistics)

    context = [block(dim, ratio, tokens.context)] * size.depth
    predictor = [block(width, 4.0, tokens.predictor)] * size.predictor_depth
    if savings.predictor_first_block and size.predictor_depth > 1:
        predictor[0] -= (tokens.predictor - tokens.context) * width * (residual + low)
    if savings.predictor_last_block:
        predictor[-1] = last(width, 4.0, tokens.predictor, tokens.target)
    pixels = config.data.in_channels * config.model.patch_size**2
    embedded = tokens.context if savings.gather_before_embed else tokens.patches
    ends = embedded * low * pixels + tokens.context * dim * (residual + low)
    features = tokens.union if savings.target_last_block else tokens.patches
    ends += tokens.target * (width * (residual + low) + low * dim) + features * low * dim
    if not config.model.activation_checkpointing:
        return sum(context) + sum(predictor) + ends
    rows = size.predictor_depth * tokens.predictor
    if savings.predictor_first_block:
        rows -= tokens.predictor - tokens.context
    return residual * (size.depth * dim * tokens.context + width * rows) + ends


def activation_bytes(config: Config, tokens: Tokens, stage: Stage, *, bf16: bool = True) -> float:
    """Per image of a micro batch at the worst moment: what is kept, and the gradients within one block's MLP (with
    activation checkpointing, all of one block); or the forward pass of the target encoder."""
    size, width = config.model.size, config.model.predictor_embed_dim
    low, dim, ratio = BF16 if bf16 else FP32, size.embed_dim, size.mlp_ratio
    kept = kept_bytes(config, tokens, stage, bf16=bf16)
    block = (2 + 2 * ratio, 10) if not config.model.activation_checkpointing else (10 + 4 * ratio, 26)
    working = low * max(block[0] * dim * tokens.context, block[1] * width * tokens.predictor)
    return max(kept + working, low * (5 + 2 * ratio) * dim * tokens.patches)


def largest_micro_batch(per_image: float, free: float, share: int) -> int:
    """The largest divisor of a rank's share of the global batch whose activations fit; 0: not even one image."""
    fitting = [d for d in range(1, share + 1) if share % d == 0 and d * per_image <= free]
    return max(fitting, default=0)
