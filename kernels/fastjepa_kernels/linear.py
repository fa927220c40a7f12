"""x W^T + b and its gradients, which are almost all the arithmetic of a step.

On a GPU this is PyTorch's F.linear, which torch.compile fuses with what follows. On a CPU with AVX-512, oneDNN
multiplies: it adds the bias on the way, where PyTorch first writes the bias to the output for MKL to add to. oneDNN is
slower at the product that gives the weights' gradient, whose first factor is transposed, so MKL keeps that one.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastjepa_kernels.selection import choose

_SMALL = 1 << 26  # FLOPs of a product below which the Python around oneDNN costs more than oneDNN saves


def linear(x: Tensor, weight: Tensor, bias: Tensor, weight_grad: Tensor | None = None) -> Tensor:
    """F.linear(x, weight, bias).

    Args:
        x: [T, K] floating.
        weight: [N, K], x's dtype and device, or any dtype under autocast.
        bias: [N], like weight.
        weight_grad: [N, K], the buffer that is weight.grad. oneDNN's backward then adds the gradient to it within the
            product, and autograd gets none, so weight has to be a leaf without hooks. Other implementations ignore it.

    Returns:
        [T, N].
    """
    kind = x.device.type
    if (
        torch.compiler.is_compiling()  # asked first, because a graph must not depend on the number of tokens
        or 2 * x.numel() * len(weight) < _SMALL
        or torch.is_autocast_enabled(kind)
        or choose("linear", kind, x.dtype) == "torch"
    ):
        return F.linear(x, weight, bias)
    if not torch.is_grad_enabled():
        return _product(x, weight, bias)
    out: Tensor = _OneDNNLinear.apply(x, weight, bias, weight_grad)  # type: ignore[no-untyped-call]
    return out


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


class _OneDNNLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, weight_grad: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.weight_grad = weight_grad if weight.grad is weight_grad else None
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        (grad,) = grads
        wants_x, wants_weight, wants_bias, _ = ctx.needs_input_grad
        if wants_weight and ctx.weight_grad is not None:
            ctx.weight_grad.addmm_(grad.t(), x)
            wants_weight = False
        return (
            _product(grad, weight.t(), None) if wants_x else None,
            grad.t() @ x if wants_weight else None,
            grad.sum(0) if wants_bias else None,
            None,
        )
