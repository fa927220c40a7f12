"""Parameter groups, AdamW with the EMA of the context encoder, and the schedules.

The target encoder is a parameter group of the optimizer, next to the group of the weights that it averages: whoever shards,
casts, gathers and checkpoints the optimizer's parameters (DeepSpeed ZeRO) does the same to the average, in fp32, with the
same layout. One pass over a group's memory then updates the weights and their average.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastjepa.config import OptimConfig
from fastjepa.objective import IJEPA
from fastjepa_kernels import adamw_ema_


@dataclass(frozen=True)
class Schedule:
    """Learning rate, weight decay and EMA momentum of a run, pure functions of the step (paper, appendix A.1)."""

    config: OptimConfig
    steps_per_epoch: int
    total_steps: int

    def at(self, step: int) -> dict[str, float]:
        """The values that optimizer step `step` (counted from 0) uses.

        Linear warm-up from start_lr to lr, then cosine to final_lr; cosine weight decay; linear momentum. As in the official
        code, learning rate and weight decay are one step ahead: the first step already uses their values at 1.
        """
        c = self.config
        horizon = self.total_steps * c.schedule_scale
        warmup = c.warmup_epochs * self.steps_per_epoch
        ahead = step + 1
        if ahead < warmup:
            lr = c.start_lr + (c.lr - c.start_lr) * ahead / warmup
        else:
            lr = _cosine(c.lr, c.final_lr, (ahead - warmup) / max(1.0, horizon - warmup))
        start, end = c.ema_momentum
        return {
            "lr": lr,
            "weight_decay": _cosine(c.weight_decay, c.final_weight_decay, ahead / horizon),
            "ema_momentum": start + (end - start) * step / horizon,
        }


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def set_schedule(param_groups: Iterable[dict[str, Any]], values: dict[str, float]) -> None:
    """Write `Schedule.at(step)` into the optimizer; groups without weight decay keep 0."""
    for group in param_groups:
        group["lr"], group["ema_momentum"] = values["lr"], values["ema_momentum"]
        group["weight_decay"] = values["weight_decay"] if group["decay"] else 0.0


def param_groups(model: IJEPA) -> list[dict[str, Any]]:
    """encoder, predictor and target parameters, each split into decayed ones and others (biases and 1-D tensors).

    A target group names the group that it averages (`ema_of`), comes after it, and lists its parameters in the same order.
    Every group has the keys name, names (of its parameters within the model), params, decay, ema_of.
    """
    groups: list[dict[str, Any]] = []
    for part, module, ema_of in (
        ("encoder", model.context_encoder, None),
        ("predictor", model.predictor, None),
        ("target", model.target_encoder, "encoder"),
    ):
        prefix = {"encoder": "context_encoder", "predictor": "predictor", "target": "target_encoder"}[part]
        for decay in (True, False):
            suffix = "decay" if decay else "no_decay"
            named = [(n, p) for n, p in module.named_parameters() if (p.ndim > 1) == decay]
            groups.append(
                {
                    "name": f"{part}_{suffix}",
                    "names": [f"{prefix}.{n}" for n, _ in named],
                    "params": [p for _, p in named],
                    "decay": decay,
                    "ema_of": f"{ema_of}_{suffix}" if ema_of else "",
                }
            )
    return groups


class AdamWEMA(torch.optim.Optimizer):
    """AdamW whose step also moves the target groups: target <- momentum * target + (1 - momentum) * updated weights.

    Works on the parameters themselves or on what ZeRO puts in their place: this rank's flat fp32 partition of each group.
    ZeRO calls `step` once per group, with the parameters of the other groups taken away, so a target is moved together with
    its source, from tensors remembered by `bind`.

    Each group counts its updates, and has its hyper-parameters, on the device: a step reads nothing back, and its kernels
    need not be compiled anew when the schedule moves on.

    Args:
        groups: from `param_groups`.
        config: betas, eps and clip_grad; lr, weight decay and momentum come from the schedule (`set_schedule`).
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
        """Create fresh state for the tensors that each group will be stepped with, and pair the targets with their sources.

        Args:
            tensors: group name -> its parameters or this rank's partition of them, fp32.
            grad_norm: gives the global gradient norm of the step at hand, 0-dim, on the tensors' device. Where it is not
                finite, `step` changes nothing, on all ranks alike; where it is above clip_grad, the gradients are scaled
                down to it as they are read.

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
                # fp64, as the schedule has them: the weight of the new average, 1 - momentum, goes to 0.
                self._hyper_parameters[name] = torch.zeros(3, dtype=torch.float64, device=mine[0].device)
                continue
            if [x.shape for x in tensors[source]] != [x.shape for x in mine]:
                raise ValueError(f"parameter group {name} is not laid out as {source}, which it averages")
            self._targets[source] = mine

    def moments(self, tensor: Tensor) -> dict[str, Tensor]:
        """exp_avg and exp_avg_sq of one of the bound tensors; none for a target."""
        # DeepSpeed looks up the state of every tensor, which leaves empty entries behind.
        return dict(self.state.get(tensor, {}))

    @property
    def updates(self) -> int:
        """Optimizer steps that were applied: AdamW's t. Reads it back from the device."""
        return max(int(count) for count in self._updates.values())

    @updates.setter
    def updates(self, updates: int) -> None:
        for count in self._updates.values():
            count.fill_(updates)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every group that has gradients, and the targets of those groups, unless the gradient norm is not finite."""
        assert closure is None, "closures are not supported"
        assert self._grad_norm is not None, "bind comes first"
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
        """lr, weight decay and momentum on the group's device. The host does not wait for them to arrive."""
        there = self._hyper_parameters[group["name"]]
        # Pinned memory is not handed out again before the copy is done: the next step cannot overwrite these.
        here = torch.tensor(
            [group["lr"], group["weight_decay"], group["ema_momentum"]], dtype=there.dtype, pin_memory=there.is_cuda
        )
        return there.copy_(here, non_blocking=True).unbind()


def flatten_groups(groups: list[dict[str, Any]]) -> None:
    """Move each group's parameters into one flat buffer, of which they become views, and their gradients likewise.

    The group then holds that one buffer: an optimizer step, the gradient norm, zeroing and an all-reduce are each a single
    pass over contiguous memory. Padded to 16 elements, so that kernels can use wide loads.
    """
    for group in groups:
        params: list[nn.Parameter] = group["params"]
        total = sum(p.numel() for p in params)
        flat = nn.Parameter(params[0].new_zeros(-(-total // 16) * 16))
        if not group["ema_of"]:
            flat.grad = torch.zeros_like(flat)
        offset = 0
        for param in params:
            view = flat.detach()[offset : offset + param.numel()].view_as(param)
            view.copy_(param.detach())
            param.data = view
            if flat.grad is not None:
                param.grad = flat.grad[offset : offset + param.numel()].view_as(param)
                param.grad_buffer = param.grad  # type: ignore[attr-defined]  # fastjepa_kernels.linear
            offset += param.numel()
        group["params"] = [flat]
