"""The plain PyTorch twin of every operation: the shortest code that is plainly right, in any dtype, for tests."""

from __future__ import annotations

import torch
from torch import Tensor

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


def masked_gather_reference(rows: Tensor, indices: Tensor) -> Tensor:
    return rows[indices]


def adamw_ema_reference(
    param: Tensor,
    ema: Tensor,
    grads: list[Tensor],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    ema_momentum: float,
) -> tuple[Tensor, Tensor]:
    """The weights and their average after one update per gradient, by torch.optim.AdamW and a plain average."""
    weight = param.clone().requires_grad_()
    average = ema.clone()
    optimizer = torch.optim.AdamW([weight], lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
    for grad in grads:
        weight.grad = grad
        optimizer.step()
        average = ema_momentum * average + (1 - ema_momentum) * weight.detach()
    return weight.detach(), average
