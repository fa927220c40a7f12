"""Forward and backward pass of a micro batch as a CUDA graph: the host launches it at once, not kernel by kernel.

This is for small models and batches, whose kernels end before the host has launched the next. All shapes must be those of
the captured batch. I-JEPA's are in budget mode, where the number of context tokens is fixed and the target blocks of a step
have one size, so there is a graph for every number of target tokens that a step can draw (8 with the default settings on a
grid of 14 x 14).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.profiler import record_function

from fastjepa.objectives.base import Output, Prepared

_Capture = Callable[[Callable[[], Output]], tuple[Callable[[], None], Output]]


class _Captured(NamedTuple):
    inputs: list[Tensor]
    """The tensors that a replay reads: the next batch is written there."""
    replay: Callable[[], None]
    output: Output
    """The tensors that a replay writes."""


class GraphedPasses:
    """Calls `passes` for the first batch of each shape; from the second on replays what it does on the device.

    The first call is an ordinary one, in which kernels are tuned and libraries set up, as they may not be in a capture. A
    graph has memory of its own: until every shape has come twice, up to twice as much is held for activations.

    Args:
        passes: a batch -> loss and signals, detached; adds to gradients in place.
        capture: takes a function that launches work and returns a result; returns a function that launches it again, and
            the result that this writes.
    """

    def __init__(self, passes: Callable[[Prepared], Output], capture: _Capture | None = None) -> None:
        self._passes = passes
        self._capture = capture or _CUDACapture()
        self._captured: dict[object, _Captured | None] = {}
        """The graph of each shape; None: the shape was seen once."""

    def __call__(self, batch: Prepared) -> Output:
        inputs = batch.tensors()
        shape = (*batch.counts.items(), *((x.shape, x.stride(), x.dtype) for x in inputs))
        if shape not in self._captured:
            self._captured[shape] = None
            return self._passes(batch)
        captured = self._captured[shape]
        if captured is None:
            static = copy.deepcopy(batch)
            replay, output = self._capture(lambda: self._passes(static))
            captured = self._captured[shape] = _Captured(static.tensors(), replay, output)
        with record_function("graph replay"):
            torch._foreach_copy_(captured.inputs, inputs)
            captured.replay()
        loss, *others = captured.output
        return Output(loss.clone(), *({name: value.clone() for name, value in each.items()} for each in others))


class _CUDACapture:
    """All graphs use the same memory: they are replayed one after the other, and their results are copied at once."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], Output]) -> tuple[Callable[[], None], Output]:
        graph = torch.cuda.CUDAGraph()
        # Threads that load batches go on meanwhile: they must not end the capture.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = run()
        return graph.replay, result
