"""I-JEPA written as plainly as possible: one image, one target block, one attention head at a time.

Tests use it as a second implementation. It shares nothing with fastjepa but the names of the parameters.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]


def attention(x: Tensor, w: Weights, prefix: str, heads: int) -> Tensor:
    """Self-attention among the tokens [N, D] of one sequence -> [N, D]."""
    width = x.shape[1]
    qkv = x @ w[f"{prefix}.qkv.weight"].T + w[f"{prefix}.qkv.bias"]
    out = []
    for head in range(heads):
        d = width // heads
        q, k, v = (qkv[:, i * width + head * d : i * width + (head + 1) * d] for i in range(3))
        out.append((q @ k.T / math.sqrt(d)).softmax(-1) @ v)
    return torch.cat(out, 1) @ w[f"{prefix}.proj.weight"].T + w[f"{prefix}.proj.bias"]


def block(x: Tensor, w: Weights, prefix: str, heads: int) -> Tensor:
    """A pre-norm transformer block on the tokens [N, D] of one sequence -> [N, D]."""

    def norm(y: Tensor, name: str) -> Tensor:
        return F.layer_norm(y, y.shape[-1:], w[f"{prefix}.{name}.weight"], w[f"{prefix}.{name}.bias"], eps=1e-6)

    x = x + attention(norm(x, "norm1"), w, f"{prefix}.attn", heads)
    y = norm(x, "norm2") @ w[f"{prefix}.mlp.fc1.weight"].T + w[f"{prefix}.mlp.fc1.bias"]
    y = 0.5 * y * (1 + torch.erf(y / math.sqrt(2)))
    return x + y @ w[f"{prefix}.mlp.fc2.weight"].T + w[f"{prefix}.mlp.fc2.bias"]


def encoder(image: Tensor, kept: Tensor, w: Weights, heads: int, depth: int, patch: int) -> Tensor:
    """Image [C, H, W] and the indices of the patches that are seen -> features of these [kept, D]."""
    tokens = F.conv2d(image[None], w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=patch)[0]
    x = (tokens.flatten(1).T + w["pos_embed"][0])[kept]
    for i in range(depth):
        x = block(x, w, f"blocks.{i}", heads)
    return F.layer_norm(x, x.shape[-1:], w["norm.weight"], w["norm.bias"], eps=1e-6)


def predictor(context: Tensor, kept: Tensor, wanted: Tensor, w: Weights, heads: int, depth: int) -> Tensor:
    """Features [kept, D] of the context patches `kept` -> predictions [wanted, D] for the patches `wanted`."""
    x = context @ w["predictor_embed.weight"].T + w["predictor_embed.bias"] + w["predictor_pos_embed"][0, kept]
    x = torch.cat([x, w["mask_token"][0] + w["predictor_pos_embed"][0, wanted]])
    for i in range(depth):
        x = block(x, w, f"predictor_blocks.{i}", heads)
    x = F.layer_norm(x, x.shape[-1:], w["predictor_norm.weight"], w["predictor_norm.bias"], eps=1e-6)
    return x[len(kept) :] @ w["predictor_proj.weight"].T + w["predictor_proj.bias"]


def part(weights: Weights, prefix: str) -> Weights:
    """The weights whose names begin with the prefix and a dot, by the rest of their names."""
    return {name.removeprefix(prefix + "."): w for name, w in weights.items() if name.startswith(prefix + ".")}


def loss(
    images: Tensor,
    contexts: list[Tensor],
    targets: list[list[Tensor]],
    weights: Weights,
    *,
    heads: int,
    depth: int,
    predictor_depth: int,
    patch: int,
    kind: str = "smooth_l1",
    normalize: bool = True,
) -> Tensor:
    """The loss of a micro batch: the mean over all elements of all predictions.

    Args:
        images: [B, C, H, W].
        contexts: per image, the indices of the context patches.
        targets: per image and target block, the indices of its patches.
        weights: parameters and buffers of all three networks, by their names in `IJEPAObjective`.
        kind: smooth_l1 or l2.
        normalize: LayerNorm without affine over each target's features.
    """
    predictions, wanted = [], []
    for image, kept, blocks in zip(images, contexts, targets, strict=True):
        with torch.no_grad():
            everything = torch.arange(weights["target_encoder.pos_embed"].shape[1])
            h = encoder(image, everything, part(weights, "target_encoder"), heads, depth, patch)
            if normalize:
                h = (h - h.mean(-1, keepdim=True)) / (h.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        z = encoder(image, kept, part(weights, "context_encoder"), heads, depth, patch)
        for positions in blocks:
            predictions.append(predictor(z, kept, positions, part(weights, "predictor"), heads, predictor_depth))
            wanted.append(h[positions])
    error = torch.cat(predictions) - torch.cat(wanted)
    if kind == "l2":
        return (error**2).mean()
    return torch.where(error.abs() < 1, 0.5 * error**2, error.abs() - 0.5).mean()
