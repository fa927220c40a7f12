"""residual + gelu(x W^T + b), and its gradients: where almost all arithmetic of a step is.

On a GPU this is PyTorch's own, which torch.compile fuses. On a CPU with AVX-512 the products are oneDNN's, which add bias
and residual, and take GELU, on the way; PyTorch's first writes the bias to the output, for MKL to add to. oneDNN is
slower at the product that gives the weights' gradient, whose first factor is transposed: that one stays MKL's.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastjepa_kernels import _backend

_SMALL = 1 << 26  # FLOPs of a product: below, the Python around it costs more than it saves


def linear(x: Tensor, weight: Tensor, bias: Tensor, *, gelu: bool = False, residual: Tensor | None = None) -> Tensor:
    """F.linear(x, weight, bias), then F.gelu, then + residual, each if asked for.

    Args:
        x: [T, K] floating.
        weight: [N, K], of x's dtype and device, or any under autocast.
        bias: [N], like weight.
        residual: [T, N].

    Returns:
        [T, N].
    """
    kind = x.device.type
    if (
        2 * x.numel() * len(weight) < _SMALL
        or torch.is_autocast_enabled(kind)
        or torch.compiler.is_compiling()
        or _backend.choose("linear", kind, x.dtype) == "torch"
    ):
        out = F.linear(x, weight, bias)
    elif torch.is_grad_enabled():
        fused = None if gelu else residual
        out = _OneDNNLinear.apply(x, weight, bias, fused)  # type: ignore[no-untyped-call]
        residual = residual if gelu else None
    else:
        out = _product(x, weight, bias, "gelu" if gelu else "none", residual)
        gelu, residual = False, None
    out = F.gelu(out) if gelu else out
    return out if residual is None else residual + out


def _product(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none", residual: Tensor | None = None
) -> Tensor:
    product = torch.ops.mkldnn._linear_pointwise
    if residual is None:
        out: Tensor = product(x, weight, bias, activation, [], "none")  # exact GELU
    elif activation == "none":
        out = product.binary(x, residual, weight, bias, "add")
    else:
        out = residual + product(x, weight, bias, activation, [], "none")
    return out


class _OneDNNLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias, residual=residual)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        (grad,) = grads
        wants_x, wants_weight, wants_bias, wants_residual = ctx.needs_input_grad
        return (
            _product(grad, weight.t(), None) if wants_x else None,
            grad.t() @ x if wants_weight else None,
            grad.sum(0) if wants_bias else None,
            grad if wants_residual else None,
        )
