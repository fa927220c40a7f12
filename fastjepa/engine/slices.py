"""Computes a micro batch on a CPU a few images at a time: less memory, and activations stay in the caches.

The gradients are those of the whole micro batch: the loss of each slice counts by its share. A GPU takes the micro batch
whole, because it needs the parallelism.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastjepa.objectives.base import Method, Output, Prepared

_ACTIVATIONS = 320 << 20
"""Bytes of a slice's activations: four to six images of vit_tiny to vit_base at 224 x 224. More images are as fast, fewer
are slower, because their products are small."""


def slice_size(images: int, per_image: float) -> int:
    """Number of images that are computed at a time, if each takes so many bytes of activations."""
    return -(-images // max(1, round(images * per_image / _ACTIVATIONS)))


class SlicedPasses:
    """Calls `forward_and_backward(batch, share)` for one slice after the other."""

    def __init__(
        self, forward_and_backward: Callable[[Prepared, float], Output], method: Method, *, bf16: bool
    ) -> None:
        self._forward_and_backward = forward_and_backward
        self._method, self._bf16 = method, bf16

    def __call__(self, batch: Prepared) -> Output:
        """Means over the micro batch; gradients are added to the parameters'."""
        tokens = batch.lengths().tokens()
        per_image = self._method.activation_bytes(tokens, bf16=self._bf16, autocast=self._bf16)
        size = slice_size(batch.num_images, per_image)
        if size == batch.num_images:
            return self._forward_and_backward(batch, 1.0)
        loss = torch.zeros(())
        signals: dict[str, Tensor] = {}
        statistics: dict[str, Tensor] = {}
        for part, share in batch.slices(size):
            output = self._forward_and_backward(part, share)
            loss += share * output.loss
            for sums, values in ((signals, output.signals), (statistics, output.statistics)):
                for name, value in values.items():
                    sums[name] = sums.get(name, 0) + share * value
        return Output(loss, signals, statistics)
