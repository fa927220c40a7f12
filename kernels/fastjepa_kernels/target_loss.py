"""The loss: the mean distance of predictions from the target encoder's features.

    loss = mean over t and i of  f(predictions[t, i] - y[t, i]),    y[t] = LayerNorm(features[rows[t]]), without affine part
    f(e) = e^2 / (2 beta) if |e| < beta else |e| - beta / 2         smooth_l1
    f(e) = e^2                                                      l2

A feature row is a target as many times as target blocks cover its patch. Only predictions get a gradient.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastjepa_kernels.masked_gather import check_indices, check_rows
from fastjepa_kernels.selection import choose


def target_loss(
    predictions: Tensor,
    features: Tensor,
    rows: Tensor | None,
    *,
    loss: Literal["smooth_l1", "l2"] = "smooth_l1",
    normalize: bool = True,
    beta: float = 1.0,
    eps: float = 1e-5,
) -> Tensor:
    """The mean loss. It is computed in fp32 for any inputs, or in fp64 if one of them is fp64, which Triton does not take.

    Args:
        predictions: [T, D] floating, the last dimension contiguous.
        features: [R, D] floating, perhaps of another dtype, the last dimension contiguous. They are constants.
        rows: int64 [T] in [0, R), the target of each prediction. None: features[t] is the target of predictions[t].
        loss: the name of f.
        normalize: False leaves out the LayerNorm of the features.
        beta: the distance at which smooth_l1 turns from a parabola into a line.
        eps: added to the variance.

    Returns:
        A scalar; NaN if T = 0, since the mean of nothing is NaN.

    Raises:
        ValueError: shapes, strides, dtypes or devices do not fit, features require a gradient, beta <= 0, or the loss is
            unknown.
    """
    check_rows("target_loss", "predictions", predictions)
    check_rows("target_loss", "features", features)
    if features.shape[1] != predictions.shape[1] or features.device != predictions.device:
        raise ValueError(
            f"target_loss: features are {tuple(features.shape)} on {features.device}, "
            f"expected [R, {predictions.shape[1]}] on {predictions.device}, as the predictions"
        )
    if not (predictions.is_floating_point() and features.is_floating_point()):
        raise ValueError(
            f"target_loss: got {predictions.dtype} and {features.dtype}, expected floating predictions and features"
        )
    if features.requires_grad and torch.is_grad_enabled():
        raise ValueError("target_loss: features require a gradient, expected constants (no_grad)")
    if rows is not None:
        check_indices("target_loss", "rows", rows, predictions.device)
    num_targets = len(features) if rows is None else len(rows)
    if num_targets != len(predictions):
        raise ValueError(
            f"target_loss: got {num_targets} targets, expected one for each of {len(predictions)} predictions"
        )
    if loss not in ("smooth_l1", "l2"):
        raise ValueError(f"target_loss: loss is {loss!r}, expected smooth_l1 or l2")
    if beta <= 0:
        raise ValueError(f"target_loss: beta is {beta}, expected a positive number")
    if choose("target_loss", predictions.device.type, predictions.dtype) == "triton":
        from fastjepa_kernels.triton_kernels import target_loss as triton_ops

        return triton_ops.target_loss(predictions, features, rows, loss, normalize, beta, eps)
    return _target_loss_torch(predictions, features, rows, loss, normalize, beta, eps)


def _target_loss_torch(
    predictions: Tensor, features: Tensor, rows: Tensor | None, loss: str, normalize: bool, beta: float, eps: float
) -> Tensor:
    wide = torch.promote_types(torch.promote_types(predictions.dtype, features.dtype), torch.float32)
    # Normalise the smaller set: the features before rows repeat them, or only those that rows select.
    gather_first = rows is not None and len(rows) < len(features)
    targets = features.detach()
    if rows is not None and gather_first:
        targets = targets.index_select(0, rows)
    targets = targets.to(wide)
    if normalize:
        targets = F.layer_norm(targets, targets.shape[-1:], eps=eps)
    if rows is not None and not gather_first:
        targets = targets.index_select(0, rows)
    if loss == "l2":
        return F.mse_loss(predictions.to(wide), targets)
    return F.smooth_l1_loss(predictions.to(wide), targets, beta=beta)
