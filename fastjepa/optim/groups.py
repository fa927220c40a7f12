"""Parameter groups: which parameters are stepped together, and which group averages which."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastjepa.objectives.ijepa.objective import IJEPA


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
