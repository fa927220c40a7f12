"""AdamW and the exponential moving average of the updated weights, in one pass and in fp32.

    p   <- p * (1 - lr * weight_decay)
    m   <- b1 * m + (1 - b1) * g
    v   <- b2 * v + (1 - b2) * g^2
    p   <- p - lr * (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)          decoupled weight decay (Loshchilov & Hutter)
    ema <- momentum * ema + (1 - momentum) * p                               I-JEPA, section 3

The average must be kept in fp32: a bf16 average loses most of its updates as the momentum approaches 1 (97 % of the weights
never move at 0.9996).

Hyper-parameters may be 0-dim tensors on the device. Then nothing is read back, nothing is recompiled when they change, and a
captured CUDA graph sees their new values when it is replayed. Python numbers are sent with the launch, and a graph keeps
the values that it captured.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import NamedTuple

import torch
from torch import Tensor

from fastjepa_kernels.selection import choose

_HALF = (torch.bfloat16, torch.float16)
_CHUNK = 2**20  # elements that the PyTorch path takes at a time: it bounds the memory of converted and scaled gradients


@torch.no_grad()
def adamw_ema_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    ema: Tensor | None,
    *,
    step: int | Tensor,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float | Tensor,
    ema_momentum: float | Tensor,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    param_copy: Tensor | None = None,
    ema_copy: Tensor | None = None,
) -> None:
    """Update `param`, `exp_avg`, `exp_avg_sq` and, if given, `ema` in place, and write the copies.

    `step` is only read, since many tensors may share it. The caller counts before the call: `updates += 1`, or
    `updates += found_inf == 0` where there is a `found_inf`.

    Args:
        param, exp_avg, exp_avg_sq, ema: contiguous fp32 tensors of one shape. Without `ema` this is AdamW alone.
        grad: tensor of the same shape; fp32, bf16 or fp16.
        step: the number of this update, from 1.
        ema_momentum: the weight of the old average. Next to 1, an fp64 tensor keeps more digits of 1 - momentum.
        grad_scale: 0-dim tensor by which the gradient is multiplied (clipping, unscaling).
        found_inf: 0-dim tensor; unless it is 0, nothing at all is changed.
        param_copy, ema_copy: bf16 or fp16 tensors of the same shape, which get the new weights and their average, rounded.

    Triton reads nothing back from a GPU. PyTorch reads the hyper-parameters and `found_inf`; apex reads `found_inf`.

    Raises:
        ValueError: a tensor has a wrong shape, dtype, layout or device (PyTorch takes fp64 too, for tests), a beta is
            outside [0, 1), step is below 1, or there is an `ema_copy` without `ema`.
    """
    implementation = choose("adamw_ema", param.device.type, param.dtype)
    state = {"param": param, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "ema": ema}
    copies = {"param_copy": param_copy, "ema_copy": ema_copy}
    scalars = {"step": step, "lr": lr, "weight_decay": weight_decay, "ema_momentum": ema_momentum}
    _check(implementation, param, state, {"grad": grad}, copies)
    for name, flag in (("grad_scale", grad_scale), ("found_inf", found_inf)):
        if flag is not None and not isinstance(flag, Tensor):
            raise ValueError(f"adamw_ema_: {name} is {flag!r}, expected a tensor of no dimensions")
    _check_scalars(param.device, {**scalars, "grad_scale": grad_scale, "found_inf": found_inf})
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"adamw_ema_: betas are {betas}, expected two numbers in [0, 1)")
    if not isinstance(step, Tensor) and step < 1:
        raise ValueError(f"adamw_ema_: step is {step}, expected the number of this update, from 1")
    if ema_copy is not None and ema is None:
        raise ValueError("adamw_ema_: got ema_copy without ema, expected both")

    buffers = _Buffers(param, grad, exp_avg, exp_avg_sq, ema, param_copy, ema_copy)
    if implementation != "triton" and found_inf is not None and found_inf != 0:
        return
    if implementation == "torch":
        numbers = float(step), float(lr), float(weight_decay), float(ema_momentum)
        _adamw_ema_torch(buffers, *numbers, betas, eps, grad_scale)
        return
    step, lr, weight_decay, ema_momentum = (_on_device(value, param.device) for value in scalars.values())
    if implementation == "apex":
        _adamw_ema_apex(buffers, step, lr, weight_decay, ema_momentum, betas, eps, grad_scale)
        return
    from fastjepa_kernels.triton_kernels.adamw_ema import adamw_ema_op

    adamw_ema_op(*buffers, step, lr, weight_decay, ema_momentum, grad_scale, found_inf, *betas, eps)


_Tensors = Mapping[str, Tensor | None]


def _check(implementation: str, param: Tensor, state: _Tensors, grads: _Tensors, copies: _Tensors) -> None:
    wide = (torch.float32, torch.float64) if implementation == "torch" else (torch.float32,)
    same = (param.dtype,) if param.dtype in wide else (torch.float32,)
    for tensors, dtypes in ((state, same), (grads, (*same, *_HALF)), (copies, _HALF)):
        for name, x in tensors.items():
            if x is None:
                continue
            if x.dtype not in dtypes or x.shape != param.shape or x.device != param.device:
                expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
                raise ValueError(
                    f"adamw_ema_: {name} is {x.dtype} {tuple(x.shape)} on {x.device}, "
                    f"expected {expected} {tuple(param.shape)} on {param.device}"
                )
            if not x.is_contiguous():
                raise ValueError(f"adamw_ema_: {name} has strides {x.stride()}, expected contiguous {tuple(x.shape)}")


def _check_scalars(device: torch.device, scalars: Mapping[str, float | Tensor | None]) -> None:
    for name, x in scalars.items():
        if isinstance(x, Tensor) and (x.dim() > 0 or x.device != device):
            raise ValueError(f"adamw_ema_: {name} is {tuple(x.shape)} on {x.device}, expected () on {device}")


def _on_device(value: float | Tensor, device: torch.device) -> Tensor:
    # torch.full launches a fill, which does not wait for the device; a copy from the host would.
    return value if isinstance(value, Tensor) else torch.full((), value, dtype=torch.float64, device=device)


class _Buffers(NamedTuple):
    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    ema: Tensor | None
    param_copy: Tensor | None
    ema_copy: Tensor | None

    def average_and_copy(self, new_weight: float | Tensor) -> None:
        """Copy the updated weights, average them, and copy the average."""
        if self.param_copy is not None:
            self.param_copy.copy_(self.param)
        if self.ema is not None:
            self.ema.lerp_(self.param, new_weight)
            if self.ema_copy is not None:
                self.ema_copy.copy_(self.ema)

    def chunks(self) -> Iterator[_Buffers]:
        if self.param.numel() <= _CHUNK:
            yield self
            return
        flat = [x if x is None else x.view(-1).split(_CHUNK) for x in self]
        for i in range(len(self.param.view(-1).split(_CHUNK))):
            yield _Buffers(*(x if x is None else x[i] for x in flat))  # type: ignore[arg-type]

    def scaled_grad(self, grad_scale: Tensor | None) -> Tensor:
        grad = self.grad.to(self.param.dtype)
        return grad if grad_scale is None else grad * grad_scale.to(grad.dtype)


def _adamw_ema_torch(
    buffers: _Buffers,
    step: float,
    lr: float,
    weight_decay: float,
    ema_momentum: float,
    betas: tuple[float, float],
    eps: float,
    grad_scale: Tensor | None,
) -> None:
    """Update by the operator behind torch.optim.AdamW(fused=True), in a third of the time of the formula's eight passes."""
    for b in buffers.chunks():
        torch._fused_adamw_(
            [b.param],
            [b.scaled_grad(grad_scale)],
            [b.exp_avg],
            [b.exp_avg_sq],
            [],
            [torch.full((), step, device=b.param.device)],
            amsgrad=False,
            maximize=False,
            beta1=betas[0],
            beta2=betas[1],
            lr=lr,
            weight_decay=weight_decay,
            eps=eps,
        )
        b.average_and_copy(1 - ema_momentum)


def _adamw_ema_apex(
    buffers: _Buffers,
    step: Tensor,
    lr: Tensor,
    weight_decay: Tensor,
    ema_momentum: Tensor,
    betas: tuple[float, float],
    eps: float,
    grad_scale: Tensor | None,
) -> None:
    """Update by apex's multi-tensor kernel. It takes no device scalars for decay and average, so PyTorch does these two."""
    b, device = buffers, buffers.param.device
    if b.param.numel() >= 2**31:
        raise ValueError(f"adamw_ema_: param has {b.param.numel()} elements, expected fewer than 2^31, apex's limit")
    apply = import_module("apex.multi_tensor_apply").multi_tensor_applier
    adam = import_module("amp_C").multi_tensor_adam_capturable
    b.param.mul_((1 - lr * weight_decay).float())
    lists = [[b.scaled_grad(grad_scale)], [b.param], [b.exp_avg], [b.exp_avg_sq]]
    no_skip, no_scale = torch.zeros(1, dtype=torch.int32, device=device), torch.ones(1, device=device)
    decoupled, bias_correction, decay = 1, 1, 0.0
    apply(adam, no_skip, lists, lr.float(), *betas, eps, step.int(), decoupled, bias_correction, decay, no_scale)
    b.average_and_copy((1 - ema_momentum).float())
