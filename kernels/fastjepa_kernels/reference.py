"""The plain PyTorch twins of the operations, for tests and benchmarks: short code that is plainly right, in any dtype."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastjepa_kernels.masks import MaskRules, PackedMasks
from fastjepa_kernels.philox import DOMAIN_BLOCK_POSITION, DOMAIN_BUDGET, philox4x32
from fastjepa_kernels.ragged import Ragged


def block_attention_reference(q: Tensor, k: Tensor, v: Tensor, queries: Ragged, keys: Ragged, scale: float) -> Tensor:
    outs = []
    cu_q, cu_k = queries.cu_seqlens.tolist(), keys.cu_seqlens.tolist()
    for s in range(queries.num_seqs):
        qs, ks, vs = q[cu_q[s] : cu_q[s + 1]], k[cu_k[s] : cu_k[s + 1]], v[cu_k[s] : cu_k[s + 1]]
        scores = torch.einsum("qhd,khd->hqk", qs, ks) * scale
        outs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), vs))
    return torch.cat(outs) if outs else q


def patchify_reference(images: Tensor, patch_size: int) -> Tensor:
    p = patch_size
    rows = [
        image[:, y : y + p, x : x + p].flatten()
        for image in images
        for y in range(0, images.shape[2], p)
        for x in range(0, images.shape[3], p)
    ]
    return torch.stack(rows)


def gather_patches_reference(
    images: Tensor, indices: Tensor, patch_size: int, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype
) -> Tensor:
    """The kept patches, normalised in `dtype`."""
    channels = [torch.tensor(values, dtype=dtype)[:, None, None] for values in (mean, std)]
    pixels = images.to(dtype) / 255 if images.dtype == torch.uint8 else images.to(dtype)
    return patchify_reference((pixels - channels[0]) / channels[1], patch_size)[indices]


def masked_gather_reference(rows: Tensor, indices: Tensor) -> Tensor:
    return rows[indices]


def gather_add_reference(tokens: Tensor, table: Tensor, positions: Tensor) -> Tensor:
    return tokens + table[positions]


def target_loss_reference(
    predictions: Tensor,
    features: Tensor,
    rows: Tensor,
    *,
    loss: str = "smooth_l1",
    normalize: bool = True,
    beta: float = 1.0,
    eps: float = 1e-5,
) -> Tensor:
    targets = features[rows]
    if normalize:
        centred = targets - targets.mean(1, keepdim=True)
        targets = centred / (centred.square().mean(1, keepdim=True) + eps).sqrt()
    e = predictions - targets
    smooth = torch.where(e.abs() < beta, e.square() / (2 * beta), e.abs() - beta / 2)
    return (smooth if loss == "smooth_l1" else e.square()).mean()


def adamw_ema_reference(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    ema: Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    ema_momentum: float,
    grad_scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return param, exp_avg, exp_avg_sq and ema after the update, by torch.optim.AdamW and a plain average."""
    weight = param.clone().requires_grad_()
    weight.grad = grad.to(weight.dtype) * grad_scale
    optimizer = torch.optim.AdamW([weight], lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
    state = {"step": torch.tensor(step - 1.0), "exp_avg": exp_avg.clone(), "exp_avg_sq": exp_avg_sq.clone()}
    optimizer.state[weight] = state
    optimizer.step()
    average = ema_momentum * ema + (1 - ema_momentum) * weight.detach()
    return weight.detach(), state["exp_avg"], state["exp_avg_sq"], average


class ImageMasks(NamedTuple):
    """The masks of one image, as patch positions in raster order."""

    targets: list[list[int]]
    context: list[int]


def image_masks_reference(rules: MaskRules, word: Callable[[], int], budget_word: Callable[[], int]) -> ImageMasks:
    """The masks of one image before the cut of the official mode.

    Args:
        word: gives the next word of the stream of positions.
        budget_word: gives the next word of the stream of the budget mode.
    """
    h, w = rules.grid_h, rules.grid_w
    patches = set(range(h * w))

    def below(bound: int) -> int:
        return word() * bound >> 32

    def block(block_h: int, block_w: int) -> set[int]:
        top, left = below(rules.reach_h - block_h + 1), below(rules.reach_w - block_w + 1)
        return {row * w + col for row in range(top, top + block_h) for col in range(left, left + block_w)}

    def draw() -> tuple[list[set[int]], set[int]]:
        if rules.strategy == "block":
            target = block(rules.target_h, rules.target_w)
            return [target], patches - target
        if rules.strategy == "random":
            words = [word() for _ in patches]
            target = set(sorted(patches, key=words.__getitem__)[: rules.target_count])
            return [target], patches - target
        if rules.strategy == "rasterized":
            quadrants = [{p for p in patches if 2 * (p // w >= h // 2) + (p % w >= w // 2) == q} for q in range(4)]
            context = quadrants.pop(below(4))
            return quadrants, context
        targets = [block(rules.target_h, rules.target_w) for _ in range(rules.num_target_blocks)]
        for subtracted in range(rules.num_target_blocks, -1, -1):
            for _ in range(20):
                context = block(rules.context_h, rules.context_w).difference(*targets[:subtracted])
                if len(context) >= rules.min_context:
                    return targets, context
        raise AssertionError("no valid context")

    targets, context = draw()
    if rules.mode == "budget":
        words = [budget_word() for _ in patches]
        context = set(sorted(sorted(context), key=words.__getitem__)[: rules.min_context])
    return ImageMasks([sorted(target) for target in targets], sorted(context))


def cut_masks_reference(images: list[ImageMasks]) -> list[ImageMasks]:
    """Cut all lists to the shortest of the batch, as the official mode does."""
    context = min(len(image.context) for image in images)
    target = min(len(target) for image in images for target in image.targets)
    return [ImageMasks([t[:target] for t in image.targets], image.context[:context]) for image in images]


def mask_words_reference(domain: int, sample: int, step: int, seed: int) -> Callable[[], int]:
    """A function that gives the words of one stream, one per call."""

    def words() -> Iterator[int]:
        for start in itertools.count(0, 64):
            counter = np.arange(start, start + 64, dtype=np.int64)
            yield from np.stack(philox4x32(counter, domain, sample % 2**32, step, seed=seed), 1).flatten().tolist()

    return words().__next__


def mask_sampling_reference(rules: MaskRules, *, seed: int, step: int, sample_indices: Tensor) -> PackedMasks:
    images = []
    for sample in sample_indices.tolist():
        streams = [mask_words_reference(d, sample, step, seed) for d in (DOMAIN_BLOCK_POSITION, DOMAIN_BUDGET)]
        images.append(image_masks_reference(rules, *streams))
    if rules.mode == "official":
        images = cut_masks_reference(images)
    return pack_masks_reference(images, rules.num_patches)


def pack_masks_reference(images: list[ImageMasks], num_patches: int) -> PackedMasks:
    context_total = sum(len(image.context) for image in images)
    context, target, union, predictor = ([0] for _ in range(4))  # cu_seqlens
    lists: list[list[int]] = [[] for _ in range(6)]
    context_indices, target_indices, union_indices, union_rows, predictor_rows, predictor_target_rows = lists
    for b, image in enumerate(images):
        positions = sorted(set().union(*image.targets))
        for block in image.targets:
            target_indices += [b * num_patches + i for i in block]
            union_rows += [len(union_indices) + positions.index(i) for i in block]
            predictor_rows += [len(context_indices) + t for t in range(len(image.context))]
            predictor_target_rows += [len(predictor_rows) + t for t in range(len(block))]
            predictor_rows += [context_total + i for i in block]
            target.append(len(target_indices))
            predictor.append(len(predictor_rows))
        context_indices += [b * num_patches + i for i in image.context]
        union_indices += [b * num_patches + i for i in positions]
        context.append(len(context_indices))
        union.append(len(union_indices))
    cu = [torch.tensor(x, dtype=torch.int32) for x in (context, target, union, predictor)]
    return PackedMasks(
        context_indices=torch.tensor(context_indices),
        context_cu_seqlens=cu[0],
        target_indices=torch.tensor(target_indices),
        target_cu_seqlens=cu[1],
        union_indices=torch.tensor(union_indices),
        union_cu_seqlens=cu[2],
        union_rows=torch.tensor(union_rows),
        predictor_rows=torch.tensor(predictor_rows),
        predictor_cu_seqlens=cu[3],
        predictor_target_rows=torch.tensor(predictor_target_rows),
        sizes=torch.tensor([[int(x[-1]) for x in cu], [int(x.diff().max()) for x in cu]]),
    )
