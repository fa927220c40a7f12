"""Learning rate, weight decay and EMA momentum: pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from fastjepa.config import OptimConfig


@dataclass(frozen=True)
class Schedule:
    """Learning rate, weight decay and EMA momentum of a run (paper, appendix A.1)."""

    config: OptimConfig
    steps_per_epoch: int
    total_steps: int

    def at(self, step: int) -> dict[str, float]:
        """The values that optimizer step `step` (counted from 0) uses.

        The learning rate warms up linearly from start_lr to lr, then follows a cosine to final_lr. Weight decay follows a
        cosine, momentum a line. As in the official code, learning rate and weight decay are one step ahead: step 0 uses
        their values at 1.
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
    """Write the values of `Schedule.at` into the optimizer's groups. The weight decay of groups without it stays 0."""
    for group in param_groups:
        group["lr"], group["ema_momentum"] = values["lr"], values["ema_momentum"]
        group["weight_decay"] = values["weight_decay"] if group["decay"] else 0.0
