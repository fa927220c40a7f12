"""AdamW that also updates the EMA of the weights.

An average (I-JEPA's target encoder) is a parameter group of the optimizer, beside the group of the weights that it averages.
DeepSpeed ZeRO, which shards, casts, gathers and checkpoints the optimizer's parameters, therefore does the same to the
average, in fp32 and with the same layout. One pass over a group's memory then updates the weights and their average.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastjepa.config import OptimConfig
from fastjepa_kernels import adamw_ema_


class AdamWEMA(torch.optim.Optimizer):
    """AdamW whose step also updates the target groups: target <- momentum * target + (1 - momentum) * updated weights.

    It works on the parameters themselves, or on what ZeRO puts in their place: this rank's flat fp32 partition of each
    group. ZeRO calls `step` once per group, with the parameters of the other groups removed. So a target is updated together
    with its source, in tensors that `bind` has remembered.

    The update count and the hyper-parameters of each group are on the device: a step reads nothing back, and its kernels
    are not recompiled when the schedule changes a value.

    Args:
        groups: from `param_groups`.
        config: gives betas, eps and clip_grad. Learning rate, weight decay and momentum come from `set_schedule`.
    """

    def __init__(self, groups: list[dict[str, Any]], config: OptimConfig) -> None:
        defaults = {"lr": config.lr, "betas": config.betas, "eps": config.eps, "weight_decay": 0.0, "ema_momentum": 1.0}
        super().__init__(groups, defaults)
        self._targets: dict[str, list[Tensor]] = {}
        self._updates: dict[str, Tensor] = {}
        self._hyper_parameters: dict[str, Tensor] = {}
        self._clip = config.clip_grad
        self._grad_norm: Callable[[], Tensor] | None = None

    def bind(self, tensors: dict[str, list[Tensor]], grad_norm: Callable[[], Tensor]) -> None:
        """Create fresh state for the tensors that `step` will update, and pair the targets with their sources.

        Args:
            tensors: group name -> its parameters or this rank's partition of them, fp32.
            grad_norm: returns the global gradient norm of the current step, 0-dim, on the tensors' device. If it is not
                finite, `step` changes nothing on any rank. If it is above clip_grad, `step` scales the gradients down to
                clip_grad while it reads them.

        Raises:
            ValueError: a target group's tensors are not laid out as its source's.
        """
        self.state.clear()
        self._grad_norm = grad_norm
        for group in self.param_groups:
            name, source = group["name"], group["ema_of"]
            mine = tensors[name]
            if not source:
                for x in mine:
                    self.state[x] = {"exp_avg": torch.zeros_like(x), "exp_avg_sq": torch.zeros_like(x)}
                self._updates[name] = torch.zeros((), dtype=torch.int64, device=mine[0].device)
                # fp64, like the schedule: 1 - momentum, the weight of the new value in the average, goes to 0.
                self._hyper_parameters[name] = torch.zeros(3, dtype=torch.float64, device=mine[0].device)
                continue
            if [x.shape for x in tensors[source]] != [x.shape for x in mine]:
                raise ValueError(f"parameter group {name} is not laid out as {source}, which it averages")
            self._targets[source] = mine

    def moments(self, tensor: Tensor) -> dict[str, Tensor]:
        """exp_avg and exp_avg_sq of one of the bound tensors. Empty for a target."""
        # DeepSpeed looks up the state of every tensor, which leaves empty entries behind.
        return dict(self.state.get(tensor, {}))

    @property
    def updates(self) -> int:
        """Number of optimizer steps that were applied, AdamW's t. Reading it waits for the device."""
        return max(int(count) for count in self._updates.values())

    @updates.setter
    def updates(self, updates: int) -> None:
        for count in self._updates.values():
            count.fill_(updates)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every group that has gradients, and the targets of those groups, unless the gradient norm is not finite."""
        assert closure is None, "closures are not supported"
        assert self._grad_norm is not None, "call bind before step"
        norm = self._grad_norm()
        found_inf = (~norm.isfinite()).float()
        grad_scale = (self._clip / (norm + 1e-6)).clamp(max=1.0) if self._clip else None
        for group in self.param_groups:
            if group["ema_of"] or all(param.grad is None for param in group["params"]):
                continue
            name = group["name"]
            lr, weight_decay, ema_momentum = self._send_hyper_parameters(group)
            self._updates[name] += found_inf == 0
            targets = self._targets.get(name, [None] * len(group["params"]))
            for param, target in zip(group["params"], targets, strict=True):
                if param.grad is None:
                    continue
                adamw_ema_(
                    param,
                    param.grad,
                    **self.state[param],
                    ema=target,
                    step=self._updates[name],
                    lr=lr,
                    betas=group["betas"],
                    eps=group["eps"],
                    weight_decay=weight_decay,
                    ema_momentum=ema_momentum,
                    grad_scale=grad_scale,
                    found_inf=found_inf,
                )

    def _send_hyper_parameters(self, group: dict[str, Any]) -> tuple[Tensor, ...]:
        """Copy lr, weight decay and momentum to the group's device. The host does not wait for the copy."""
        on_device = self._hyper_parameters[group["name"]]
        # PyTorch does not hand out pinned memory again before the copy is done: the next step cannot overwrite these values.
        on_host = torch.tensor(
            [group["lr"], group["weight_decay"], group["ema_momentum"]],
            dtype=on_device.dtype,
            pin_memory=on_device.is_cuda,
        )
        return on_device.copy_(on_host, non_blocking=True).unbind()
