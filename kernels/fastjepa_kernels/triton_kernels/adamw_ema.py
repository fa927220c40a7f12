"""AdamW, the average of the weights and the casts of both in one pass over flat buffers (Triton).

    p   <- p * (1 - lr * weight_decay)
    m   <- m + (1 - b1) * (g - m)                          g: the gradient times grad_scale, in fp32
    v   <- b2 * v + (1 - b2) * g^2
    p   <- p - lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps)
    ema <- ema + (1 - momentum) * (p - ema)

All tensors have n elements. p, m, v and ema are fp32, the gradient is fp32, bf16 or fp16, and the copies are bf16 or fp16.
The update is in place, so it is not autotuned: a trial run would be an update.

The kernel is limited by memory. It reads p, m, v, ema and the gradient once, and writes p, m, v, ema and the copies once: 32
bytes per element plus those of the gradient and the copies, which makes 38 with a bf16 gradient and both copies. A program
takes 16 bytes of fp32 per thread and tensor; with more, the stores would be strided, or would pass through shared memory to
fit the 16-bit copies. Many programs on each multiprocessor keep enough bytes in flight.

Every program loads the scalars (0-dim tensors), so a captured graph sees new values when it is replayed. They are combined
in their own dtype: in fp64, 1 - momentum keeps its digits next to a momentum of 1.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 512
_NUM_WARPS = _BLOCK // (4 * 32)  # 4 elements of fp32 per thread: one 16-byte access
_SCALARS = ["p_step", "p_lr", "p_weight_decay", "p_momentum", "p_grad_scale", "p_found_inf"]


@triton.jit
def _one_minus_exp(x):
    """1 - e^x for x <= 0 in fp32, within 3e-7 of its value: by the series next to 0, where the subtraction cancels."""
    series = 1.0 + x * (1.0 / 8)
    for i in tl.static_range(6):
        series = 1.0 + x * series * (1.0 / (7 - i))
    return tl.where(x > -0.5, -x * series, 1.0 - tl.exp(x))


@triton.jit
def _load(p, o, n, TAIL: tl.constexpr):
    b = tl.load(p + o, o < n, other=0.0) if TAIL else tl.load(p + o)
    return b.to(tl.float32)


@triton.jit
def _store(p, o, b, n, TAIL: tl.constexpr):
    if TAIL:
        tl.store(p + o, b.to(p.dtype.element_ty), o < n)
    else:
        tl.store(p + o, b.to(p.dtype.element_ty))


@triton.jit
def _average_block(p_ema, p_copy, b_param, new_weight, o, n, TAIL: tl.constexpr):
    b_ema = _load(p_ema, o, n, TAIL)
    b_ema += new_weight * (b_param - b_ema)
    _store(p_ema, o, b_ema, n, TAIL)
    if p_copy is not None:
        _store(p_copy, o, b_ema, n, TAIL)


@triton.jit
def _adamw_ema_block(
    p_param,
    p_grad,
    p_exp_avg,
    p_exp_avg_sq,
    p_ema,
    p_param_copy,
    p_ema_copy,
    grad_scale,
    keep,
    step_size,
    root_correction,
    new_weight,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    EPS: tl.constexpr,
    o,
    n,
    TAIL: tl.constexpr,
):
    b_param = _load(p_param, o, n, TAIL)  # each [BLOCK]
    b_grad = _load(p_grad, o, n, TAIL) * grad_scale
    b_exp_avg = _load(p_exp_avg, o, n, TAIL)
    b_exp_avg_sq = _load(p_exp_avg_sq, o, n, TAIL)
    b_exp_avg += (1 - BETA1) * (b_grad - b_exp_avg)
    b_exp_avg_sq = BETA2 * b_exp_avg_sq + (1 - BETA2) * b_grad * b_grad
    b_denominator = tl.div_rn(tl.sqrt_rn(b_exp_avg_sq), root_correction) + EPS
    b_param = b_param * keep - step_size * tl.div_rn(b_exp_avg, b_denominator)
    _store(p_param, o, b_param, n, TAIL)
    _store(p_exp_avg, o, b_exp_avg, n, TAIL)
    _store(p_exp_avg_sq, o, b_exp_avg_sq, n, TAIL)
    if p_param_copy is not None:
        _store(p_param_copy, o, b_param, n, TAIL)
    if p_ema is not None:
        _average_block(p_ema, p_ema_copy, b_param, new_weight, o, n, TAIL)


# The kernel is not specialised on n, so that the sizes of a model's groups share one compilation; the price is a mask, which
# makes accesses scalar, in the last program only. Nor is it specialised on the scalars' alignment, because they may be
# elements of one tensor.
@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=_SCALARS)
def _adamw_ema_kernel(
    p_param,
    p_grad,
    p_exp_avg,
    p_exp_avg_sq,
    p_ema,
    p_param_copy,
    p_ema_copy,
    p_step,
    p_lr,
    p_weight_decay,
    p_momentum,
    p_grad_scale,
    p_found_inf,
    n,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    LOG_BETA1: tl.constexpr,
    LOG_BETA2: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if p_found_inf is not None and tl.load(p_found_inf) != 0:
        return
    step = tl.load(p_step).to(tl.float32)
    lr = tl.load(p_lr)
    keep = (1 - lr * tl.load(p_weight_decay)).to(tl.float32)
    step_size = tl.div_rn(lr.to(tl.float32), _one_minus_exp(step * LOG_BETA1))
    root_correction = tl.sqrt_rn(_one_minus_exp(step * LOG_BETA2))
    new_weight = (1 - tl.load(p_momentum)).to(tl.float32)
    grad_scale = 1.0
    if p_grad_scale is not None:
        grad_scale = tl.load(p_grad_scale).to(tl.float32)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    o = first + tl.arange(0, BLOCK)
    if first + BLOCK <= n:
        _adamw_ema_block(
            p_param, p_grad, p_exp_avg, p_exp_avg_sq, p_ema, p_param_copy, p_ema_copy,
            grad_scale, keep, step_size, root_correction, new_weight, BETA1, BETA2, EPS, o, n, TAIL=False,
        )  # fmt: skip
    else:
        _adamw_ema_block(
            p_param, p_grad, p_exp_avg, p_exp_avg_sq, p_ema, p_param_copy, p_ema_copy,
            grad_scale, keep, step_size, root_correction, new_weight, BETA1, BETA2, EPS, o, n, TAIL=True,
        )  # fmt: skip


@torch.library.custom_op(
    "fastjepa::adamw_ema_",
    mutates_args=("param", "exp_avg", "exp_avg_sq", "ema", "param_copy", "ema_copy"),
)
def adamw_ema_op(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    ema: Tensor | None,
    param_copy: Tensor | None,
    ema_copy: Tensor | None,
    step: Tensor,
    lr: Tensor,
    weight_decay: Tensor,
    ema_momentum: Tensor,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    n = param.numel()
    if n == 0:
        return
    _adamw_ema_kernel[(triton.cdiv(n, _BLOCK),)](
        param,
        grad,
        exp_avg,
        exp_avg_sq,
        ema,
        param_copy,
        ema_copy,
        step,
        lr,
        weight_decay,
        ema_momentum,
        grad_scale,
        found_inf,
        n,
        BETA1=beta1,
        BETA2=beta2,
        LOG_BETA1=math.log(beta1) if beta1 else -math.inf,
        LOG_BETA2=math.log(beta2) if beta2 else -math.inf,
        EPS=eps,
        BLOCK=_BLOCK,
        num_warps=_NUM_WARPS,
    )


@adamw_ema_op.register_fake
def _nothing_returned(*args: object) -> None:
    pass
