"""Parameter groups: sets of parameters that are updated together, and the pairing of averages with their sources."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fastjepa.objectives.base import Part

FLAT_ALIGNMENT = 16
"""A group's flat buffer is padded to a multiple of this many elements, so that kernels can use wide loads."""


def param_groups(parts: Sequence[Part]) -> list[dict[str, Any]]:
    """Split the parameters of each part into those with weight decay and those without (biases and other 1-D tensors).

    The group of an average names the group that it averages (`ema_of`), comes after it, and lists its parameters in the
    same order. Every group has the keys name, part, names (of its parameters within the objective), params, decay and
    ema_of. Groups without parameters are left out.
    """
    groups: list[dict[str, Any]] = []
    for part in parts:
        for decay in (True, False):
            suffix = "decay" if decay else "no_decay"
            named = [(n, p) for n, p in part.module.named_parameters() if (p.ndim > 1) == decay]
            if named:
                groups.append(
                    {
                        "name": f"{part.name}_{suffix}",
                        "part": part.name,
                        "names": [f"{part.name}.{n}" for n, _ in named],
                        "params": [p for _, p in named],
                        "decay": decay,
                        "ema_of": f"{part.averages}_{suffix}" if part.averages else "",
                    }
                )
    return groups


def flatten_groups(groups: list[dict[str, Any]]) -> None:
    """Move each group's parameters into one flat buffer, and their gradients into another; both become views of it.

    The group then has the buffer as its only parameter: an optimizer step, the gradient norm, zeroing and an all-reduce are
    each a single pass over contiguous memory. The buffer is padded to a multiple of FLAT_ALIGNMENT elements.
    """
    for group in groups:
        params: list[nn.Parameter] = group["params"]
        total = sum(p.numel() for p in params)
        flat = nn.Parameter(params[0].new_zeros(-(-total // FLAT_ALIGNMENT) * FLAT_ALIGNMENT))
        if not group["ema_of"]:
            flat.grad = torch.zeros_like(flat)
        offset = 0
        for param in params:
            view = flat.detach()[offset : offset + param.numel()].view_as(param)
            view.copy_(param.detach())
            param.data = view
            if flat.grad is not None:
                param.grad = flat.grad[offset : offset + param.numel()].view_as(param)
            offset += param.numel()
        group["params"] = [flat]
