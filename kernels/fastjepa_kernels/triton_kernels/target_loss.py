"""Gather, LayerNorm and distance in one pass, forward and backward (Triton).

    y[t] = (features[rows[t]] - mean_t) * rstd_t;   e = predictions - y;   loss = sum f(e) / (T * D)
    d predictions = f'(e) * upstream / (T * D);     f' is clamp(e / beta, -1, 1) for smooth_l1 and 2 e for l2

Both kernels are bound by memory bandwidth. The forward reads every prediction and target row once and keeps it in registers
for the mean, the variance (the mean square of the differences, which does not cancel) and the distance. It writes three
numbers per row: loss, mean and rstd. torch.sum adds the rows' losses in a fixed order. Neither the targets nor the
differences are ever written.

The backward reads predictions and features again and writes the gradient. The alternative is a gradient that the forward
writes and the backward scales by the upstream gradient. It moves the same bytes (forward: read both, write one; backward:
read one, write one; five passes over [T, D] either way), but keeps a second [T, D] alive in between. The upstream
gradient is read from device memory, so loss scaling needs no synchronisation.

A row is a tuple of blocks of columns: 768 is 3 x 256, 1280 is 5 x 256, and 1408 is 6 x 256 with a twelfth of the lanes idle.
A single block of a power of two would leave a quarter to three eighths of them idle.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastjepa_kernels.triton_kernels import one_if_interpreted
from fastjepa_kernels.triton_kernels.masked_gather import columns

# A tile has 8 elements for each thread: an access of 16 bytes in half precision, so that one warp holds a row.
_TILES = one_if_interpreted([triton.Config({"TILE": 256 * warps}, num_warps=warps) for warps in (4, 2, 1)])


@triton.jit
def _columns(block: tl.constexpr, WIDTH: tl.constexpr, COLS: tl.constexpr):
    """The columns of a block, and True for those that exist. Both [1, COLS]."""
    o_col = block * COLS + tl.arange(0, COLS)[None, :]
    return o_col, o_col < WIDTH


@triton.jit
def _load_rows(p_x, o_row, m_row, S_X: tl.constexpr, WIDTH: tl.constexpr, COLS: tl.constexpr, BLOCKS: tl.constexpr):
    """Rows of x in fp32 as a tuple of blocks [ROWS, COLS], 0 beyond the last row and column."""
    blocks: tl.tuple = ()
    for block in tl.static_range(BLOCKS):
        o_col, m_col = _columns(block, WIDTH, COLS)
        x = tl.load(p_x + o_row[:, None] * S_X + o_col, mask=m_row[:, None] & m_col, other=0)
        blocks = blocks + (x.to(tl.float32),)  # noqa: RUF005 (Triton has no unpacking)
    return blocks


@triton.autotune(configs=_TILES, key=["WIDTH"])
@triton.jit(do_not_specialize=["num_tokens"])
def _forward_kernel(
    p_predictions,
    p_features,
    p_rows,
    p_losses,
    p_mean,
    p_rstd,
    num_tokens,
    S_PREDICTIONS: tl.constexpr,
    S_FEATURES: tl.constexpr,
    WIDTH: tl.constexpr,
    COLS: tl.constexpr,
    BLOCKS: tl.constexpr,
    SMOOTH: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BETA: tl.constexpr,
    EPS: tl.constexpr,
    TILE: tl.constexpr,
):
    ROWS: tl.constexpr = TILE // COLS
    o_token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    m_token = o_token < num_tokens
    o_row = o_token if p_rows is None else tl.load(p_rows + o_token, mask=m_token, other=0)
    target = _load_rows(p_features, o_row, m_token, S_FEATURES, WIDTH, COLS, BLOCKS)
    prediction = _load_rows(p_predictions, o_token, m_token, S_PREDICTIONS, WIDTH, COLS, BLOCKS)
    mean = tl.zeros([ROWS], tl.float32)
    rstd = tl.full([ROWS], 1.0, tl.float32)
    if NORMALIZE:
        for block in tl.static_range(BLOCKS):
            mean += tl.sum(target[block], 1)
        mean /= WIDTH
        variance = tl.zeros([ROWS], tl.float32)
        for block in tl.static_range(BLOCKS):
            _, m_col = _columns(block, WIDTH, COLS)
            centred = tl.where(m_col, target[block] - mean[:, None], 0.0)
            variance += tl.sum(centred * centred, 1)
        rstd = tl.rsqrt(variance / WIDTH + EPS)
        tl.store(p_mean + o_token, mean, mask=m_token)
        tl.store(p_rstd + o_token, rstd, mask=m_token)
    loss = tl.zeros([ROWS], tl.float32)
    for block in tl.static_range(BLOCKS):
        _, m_col = _columns(block, WIDTH, COLS)
        e = tl.where(m_col, prediction[block] - (target[block] - mean[:, None]) * rstd[:, None], 0.0)
        f = e * e
        if SMOOTH:
            f = tl.where(tl.abs(e) < BETA, f * (0.5 / BETA), tl.abs(e) - 0.5 * BETA)
        loss += tl.sum(f, 1)
    tl.store(p_losses + o_token, loss, mask=m_token)


@triton.autotune(configs=_TILES, key=["WIDTH"])
@triton.jit(do_not_specialize=["num_tokens"])
def _backward_kernel(
    p_upstream,
    p_predictions,
    p_features,
    p_rows,
    p_mean,
    p_rstd,
    p_grad,
    num_tokens,
    per_element,  # 1 / (T * D)
    S_PREDICTIONS: tl.constexpr,
    S_FEATURES: tl.constexpr,
    WIDTH: tl.constexpr,
    COLS: tl.constexpr,
    BLOCKS: tl.constexpr,
    SMOOTH: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BETA: tl.constexpr,
    TILE: tl.constexpr,
):
    ROWS: tl.constexpr = TILE // COLS
    o_token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    m_token = o_token < num_tokens
    o_row = o_token if p_rows is None else tl.load(p_rows + o_token, mask=m_token, other=0)
    target = _load_rows(p_features, o_row, m_token, S_FEATURES, WIDTH, COLS, BLOCKS)
    prediction = _load_rows(p_predictions, o_token, m_token, S_PREDICTIONS, WIDTH, COLS, BLOCKS)
    mean = tl.zeros([ROWS], tl.float32)
    rstd = tl.full([ROWS], 1.0, tl.float32)
    if NORMALIZE:
        mean = tl.load(p_mean + o_token, mask=m_token, other=0)
        rstd = tl.load(p_rstd + o_token, mask=m_token, other=0)
    scale = tl.load(p_upstream) * per_element
    for block in tl.static_range(BLOCKS):
        e = prediction[block] - (target[block] - mean[:, None]) * rstd[:, None]
        slope = 2.0 * e
        if SMOOTH:  # the quotient is the last alternative, so that a NaN passes through
            slope = tl.where(e >= BETA, 1.0, tl.where(e <= -BETA, -1.0, e / BETA))
        o_col, m_col = _columns(block, WIDTH, COLS)
        grad = (slope * scale).to(p_grad.dtype.element_ty)
        tl.store(p_grad + o_token[:, None] * WIDTH + o_col, grad, mask=m_token[:, None] & m_col)


def _constants(predictions: Tensor, features: Tensor, loss: str, normalize: bool, beta: float) -> dict[str, Any]:
    width = predictions.shape[1]
    return {
        "S_PREDICTIONS": predictions.stride(0),
        "S_FEATURES": features.stride(0),
        "WIDTH": width,
        "COLS": columns(width),
        "BLOCKS": triton.cdiv(width, columns(width)),
        "SMOOTH": loss == "smooth_l1",
        "NORMALIZE": normalize,
        "BETA": beta,
    }


def _grid(num_tokens: int) -> Any:
    return lambda meta: (triton.cdiv(num_tokens, meta["TILE"] // meta["COLS"]),)


@torch.library.custom_op("fastjepa::target_loss", mutates_args=())
def _target_loss(
    predictions: Tensor, features: Tensor, rows: Tensor | None, loss: str, normalize: bool, beta: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and for the backward the mean and rstd of each target row (empty if they are not needed)."""
    if torch.float64 in (predictions.dtype, features.dtype):
        raise ValueError(
            f"target_loss: got {predictions.dtype} and {features.dtype}, expected no float64: Triton computes in float32"
        )
    num_tokens, width = predictions.shape
    _, mean, rstd = _empty_loss(predictions, features, rows, loss, normalize, beta, eps)
    losses = predictions.new_empty(num_tokens, dtype=torch.float32)
    if predictions.numel():
        constants = _constants(predictions, features, loss, normalize, beta)
        _forward_kernel[_grid(num_tokens)](
            predictions, features, rows, losses, mean, rstd, num_tokens, **constants, EPS=eps
        )
    return losses.sum() / (num_tokens * width), mean, rstd


@_target_loss.register_fake
def _empty_loss(
    predictions: Tensor, features: Tensor, rows: Tensor | None, loss: str, normalize: bool, beta: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    statistics = predictions.shape[0] if normalize else 0
    scalar, mean, rstd = (predictions.new_empty(n, dtype=torch.float32) for n in ((), statistics, statistics))
    return scalar, mean, rstd


@torch.library.custom_op("fastjepa::target_loss_backward", mutates_args=())
def _target_loss_backward(
    upstream: Tensor,
    predictions: Tensor,
    features: Tensor,
    rows: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    loss: str,
    normalize: bool,
    beta: float,
) -> Tensor:
    num_tokens, width = predictions.shape
    grad = predictions.new_empty(num_tokens, width)
    if grad.numel():
        constants = _constants(predictions, features, loss, normalize, beta)
        per_element = 1 / (num_tokens * width)
        _backward_kernel[_grid(num_tokens)](
            upstream, predictions, features, rows, mean, rstd, grad, num_tokens, per_element, **constants
        )
    return grad


@_target_loss_backward.register_fake
def _empty_gradient(upstream: Tensor, predictions: Tensor, *others: Any) -> Tensor:
    return predictions.new_empty(predictions.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    predictions, features, rows, *ctx.settings, _ = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(predictions, features, rows, mean, rstd)


def _backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    return _target_loss_backward(upstream, *ctx.saved_tensors, *ctx.settings), *[None] * 6


_target_loss.register_autograd(_backward, setup_context=_save)


def target_loss(
    predictions: Tensor, features: Tensor, rows: Tensor | None, loss: str, normalize: bool, beta: float, eps: float
) -> Tensor:
    return _target_loss(predictions, features, rows, loss, normalize, beta, eps)[0]
