"""A micro batch on a CPU, a few images at a time: less memory, and more of what passes between two layers in the caches.

The gradients are those of the whole micro batch: each slice's mean loss counts by its share of the target tokens. A GPU
takes the micro batch whole, for it needs the parallelism.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastjepa.config import Config
from fastjepa.objectives.ijepa import costs
from fastjepa.objectives.ijepa.masks import MaskBatch

_ACTIVATIONS = 320 << 20
"""Bytes of a slice's activations: four to six images of vit_tiny to vit_base at 224 x 224. More are as fast, fewer slower:
their products are small."""


def slice_size(images: int, per_image: float) -> int:
    """How many of a micro batch's images are computed at a time, if each takes so many bytes of activations."""
    return -(-images // max(1, round(images * per_image / _ACTIVATIONS)))


class SlicedPasses:
    """Calls `forward_and_backward(images, masks, share)` for one slice after the other."""

    def __init__(
        self, forward_and_backward: Callable[[Tensor, MaskBatch, float], Tensor], config: Config, *, bf16: bool
    ) -> None:
        self._forward_and_backward = forward_and_backward
        self._config, self._bf16 = config, bf16

    def __call__(self, images: Tensor, masks: MaskBatch) -> Tensor:
        """The mean loss of the micro batch; gradients are added to the parameters'."""
        tokens = costs.Lengths.of(masks).tokens()
        per_image = costs.activation_bytes(self._config, tokens, "torch", bf16=self._bf16)
        size = slice_size(masks.num_images, per_image)
        if size == masks.num_images:
            return self._forward_and_backward(images, masks, 1.0)
        loss = torch.zeros(())
        for part_images, part in zip(images.split(size), masks.slices(size), strict=True):
            share = part.target.total / masks.target.total
            loss += share * self._forward_and_backward(part_images, part, share)
        return loss
