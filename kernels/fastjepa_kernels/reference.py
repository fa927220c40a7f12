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
    """param, exp_avg, exp_avg_sq and ema after the update, by torch.optim.AdamW and a plain average."""
    weight = param.clone().requires_grad_()
    weight.grad = grad.to(weight.dtype) * grad_scale
    optimizer = torch.optim.AdamW([weight], lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
    state = {"step": torch.tensor(step - 1.0), "exp_avg": exp_avg.clone(), "exp_avg_sq": exp_avg_sq.clone()}
    optimizer.state[weight] = state
    optimizer.step()
    average = ema_reference(ema, weight.detach(), momentum=ema_momentum)
    return weight.detach(), state["exp_avg"], state["exp_avg_sq"], average


def ema_reference(ema: Tensor, param: Tensor, *, momentum: float) -> Tensor:
    return momentum * ema + (1 - momentum) * param
