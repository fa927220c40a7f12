"""AdamW and the exponential moving average of the updated weights, in fp32.

    p   <- p * (1 - lr * weight_decay)
    m   <- b1 * m + (1 - b1) * g
    v   <- b2 * v + (1 - b2) * g^2
    p   <- p - lr * (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)          decoupled weight decay (Loshchilov & Hutter)
    ema <- momentum * ema + (1 - momentum) * p                               I-JEPA, section 3

The average must be kept in fp32: in bf16 most updates are lost as the momentum approaches 1 (97 % of the weights never
move at 0.9996).
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def adamw_ema_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    ema: Tensor | None,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    ema_momentum: float,
) -> None:
    """Update `param`, `exp_avg`, `exp_avg_sq` and, if given, `ema` in place.

    Args:
        param, exp_avg, exp_avg_sq, ema: fp32 tensors of one shape.
        grad: the same shape, fp32.
        step: number of this update, from 1.
        ema_momentum: weight of the old average.

    Raises:
        ValueError: a tensor is not fp32 (fp64 is let through, for tests), or shapes differ.
    """
    for name, x in (("param", param), ("grad", grad), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq), ("ema", ema)):
        if x is None:
            continue
        if x.dtype not in (torch.float32, torch.float64) or x.shape != param.shape:
            raise ValueError(f"adamw_ema_: {name} is {x.dtype} {tuple(x.shape)}, expected float32 {tuple(param.shape)}")
    beta1, beta2 = betas
    param.mul_(1 - lr * weight_decay)
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = exp_avg_sq.sqrt().div_((1 - beta2**step) ** 0.5).add_(eps)
    param.addcdiv_(exp_avg, denominator, value=-lr / (1 - beta1**step))
    if ema is not None:
        ema.lerp_(param, 1 - ema_momentum)
