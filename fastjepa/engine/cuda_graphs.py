"""Forward and backward pass of a micro batch as a CUDA graph: the host launches it at once, not kernel by kernel.

For small models and batches, whose kernels end before the host has launched the next. All shapes must be those of the
captured batch: in budget mode the number of context tokens is fixed, and the target blocks of a step have one size, so there
is a graph for every number of target tokens that a step can draw (8 with the default settings on a grid of 14 x 14).
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.profiler import record_function

from fastjepa.objectives.ijepa.masks import MaskBatch
from fastjepa_kernels import Ragged


class _Captured(NamedTuple):
    inputs: list[Tensor]
    """What a replay reads: the next batch is written there."""
    replay: Callable[[], None]
    loss: Tensor
    """What a replay writes."""


class GraphedPasses:
    """Calls `passes` for the first batch of each shape; from the second on replays what it does on the device.

    The first call is an ordinary one: kernels are tuned and libraries set up in it, as they may not be in a capture. It has
    memory of its own: until every shape has come twice, up to twice as much is held for activations.

    Args:
        passes: images and masks -> loss, detached; adds to gradients in place. The masks that it gets have no union of
            target blocks, whose size varies.
        capture: takes a function that launches work and returns a result; returns a function that launches it again, and the
            result that this writes.
    """

    def __init__(
        self,
        passes: Callable[[Tensor, MaskBatch], Tensor],
        capture: Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]] | None = None,
    ) -> None:
        self._passes = passes
        self._capture = capture or _CUDACapture()
        self._captured: dict[object, _Captured | None] = {}
        """By shape; None: seen once."""

    def __call__(self, images: Tensor, masks: MaskBatch) -> Tensor:
        masks = _without_union(masks)
        inputs = _tensors(images, masks)
        shape = tuple((x.shape, x.stride(), x.dtype) for x in inputs)
        if shape not in self._captured:
            self._captured[shape] = None
            return self._passes(images, masks)
        captured = self._captured[shape]
        if captured is None:
            static_images, static_masks = copy.deepcopy((images, masks))
            replay, loss = self._capture(lambda: self._passes(static_images, static_masks))
            captured = self._captured[shape] = _Captured(_tensors(static_images, static_masks), replay, loss)
        with record_function("graph replay"):
            torch._foreach_copy_(captured.inputs, inputs)
            captured.replay()
        return captured.loss.clone()


class _CUDACapture:
    """All graphs use the same memory: they are replayed one after the other, and their results are copied at once."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        graph = torch.cuda.CUDAGraph()
        # Threads that load batches go on meanwhile: they must not end the capture.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = run()
        return graph.replay, result


def _without_union(masks: MaskBatch) -> MaskBatch:
    nothing = masks.union_indices[:0]
    empty = Ragged.uniform(0, 0, nothing.device)
    return dataclasses.replace(masks, union_indices=nothing, union=empty, union_rows=nothing)


def _tensors(images: Tensor, masks: MaskBatch) -> list[Tensor]:
    values = [value.cu_seqlens if isinstance(value, Ragged) else value for value in vars(masks).values()]
    return [images, *(value for value in values if isinstance(value, Tensor))]
