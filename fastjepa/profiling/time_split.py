"""Splits the time of a step by part and by operator or kernel, from a trace of torch.profiler.

On a CPU, a part takes the time that the step's thread spends within the part's annotation (`record_function`). On a GPU, it
takes the time of the kernels that were launched within the annotation, whatever the host does when they run. The annotation
is looked up on the thread that launched the kernel; if that thread has none (autograd's), on the step's thread.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple

STEP = "traced step"
"""The annotation of every traced step. On a GPU no work is under way when the first begins and when the last ends."""
DATA_WAIT = "data wait"
STEP_PARTS = (
    "backward", "optimizer", "waiting for gradients", "waiting for weights", "graph replay", DATA_WAIT,
)  # fmt: skip
LOADER_PARTS = ("loader", "preparing")
COMMUNICATION, IDLE, OTHER = "communication", "idle", "other"

_COLLECTIVE = re.compile(r"^(nccl|gloo:)", re.IGNORECASE)
_MATMUL_OPERATOR = re.compile(
    r"^aten::_?(scaled_|add|b|baddb)?(mm|addmm_activation)\w*$|scaled_dot_product_|_flash_attention|_efficient_attention"
    r"|block_attention|_mkl_linear|linear_pointwise"
)
# For kernels whose operator is not known: kernels of the libraries that PyTorch calls, of its compiler, and our own.
_MATMUL_KERNEL = re.compile(
    r"gemm|cutlass|nvjet|xmma|triton_tem_fused|flash_|fmha|_attend_|_backward_(keys|queries)_kernel"
)

Kind = Literal["matmul", "communication", "other"]


@dataclass(frozen=True)
class Part:
    """A part of a step."""

    name: str
    ms: float
    """Milliseconds per step."""
    share: float
    """Share of the time of the traced steps."""


@dataclass(frozen=True)
class Operator:
    """A PyTorch operator on a CPU, without the operators that it calls; a kernel on a GPU."""

    name: str
    kind: Kind
    calls: float
    """Calls per step."""
    ms: float
    """Milliseconds per step."""
    share: float
    """Share of the time of the traced steps."""


@dataclass(frozen=True)
class TimeSplit:
    """The time of steps under the profiler, which slows them down: only the shares hold for the timed steps too."""

    step_ms: float
    parts: tuple[Part, ...]
    """Parts that add up to the step. `other` is the rest of the step's thread (CPU) or kernels outside annotations (GPU);
    `communication` is collectives while no kernel of the step ran; `idle` is time in which the GPU had nothing to do."""
    beside: tuple[Part, ...]
    """Work beside the step, on other threads and streams: the loader's threads and collectives."""
    matmul_share: float
    """Share of the steps' time in matrix products and attention."""
    operators: tuple[Operator, ...]
    """Sorted by time, longest first."""


class _Span(NamedTuple):
    """A named span of time. Start and end are in microseconds."""

    start: float
    end: float
    name: str
    priority: int = 0


class _Thread:
    """The annotations of one thread, which nest."""

    def __init__(self, spans: list[_Span]) -> None:
        self._spans = sorted(spans, key=lambda span: (span.start, -span.end))
        self._starts = [span.start for span in self._spans]

    def at(self, time: float) -> str | None:
        """The innermost annotation at this time."""
        for span in reversed(self._spans[: bisect_right(self._starts, time)]):
            if time <= span.end:
                return span.name
        return None


def split_time(events: Iterable[dict[str, Any]], stages: Sequence[str]) -> TimeSplit:
    """Split the time of the steps in a Chrome trace. Each step has the annotation STEP.

    Args:
        events: `traceEvents` of the trace.
        stages: names of the annotations within the objective's forward pass (`Method.stages`).

    Raises:
        ValueError: the trace has no annotation STEP.
    """
    spans = [event for event in events if event.get("ph") == "X" and "dur" in event]
    steps = [event for event in spans if event["name"] == STEP and event["cat"] == "user_annotation"]
    if not steps:
        raise ValueError(f"the trace has no annotation {STEP!r}")
    main = steps[0]["tid"]
    start, end = min(map(_start, steps)), max(map(_end, steps))
    inside = [event for event in spans if start <= _start(event) and _end(event) <= end]
    overlapping = [event for event in spans if _start(event) < end and start < _end(event)]
    annotations: dict[Any, list[_Span]] = defaultdict(list)
    for event in overlapping:
        if event["cat"] == "user_annotation" and event["name"] in (*stages, *STEP_PARTS, *LOADER_PARTS):
            annotations[event["tid"]].append(_Span(_start(event), _end(event), event["name"]))
    kernels = [event for event in inside if event["cat"] in ("kernel", "gpu_memcpy", "gpu_memset")]
    if kernels:
        timeline = _labelled(kernels, spans, annotations, main)
        timeline += [span._replace(priority=-1) for span in annotations[main] if span.name == DATA_WAIT]
        rest = IDLE
        operators = _kernel_times(kernels, spans)
        collectives = [span for span in timeline if span.name == COMMUNICATION]
    else:
        timeline, rest = annotations[main], OTHER
        operators = _self_times([e for e in inside if e["tid"] == main and e["cat"] in ("cpu_op", "user_annotation")])
        found = (e for e in overlapping if _COLLECTIVE.match(e["name"]))
        collectives = [_Span(_start(event), _end(event), COMMUNICATION) for event in found]

    def part(name: str, microseconds: float) -> Part:
        return Part(name, microseconds / 1e3 / len(steps), microseconds / (end - start))

    taken = dict(_covered(timeline, start, end))
    named = {name: taken.pop(name) for name in (*stages, *STEP_PARTS) if name in taken}
    named |= dict(sorted(taken.items()))
    named[rest] = named.get(rest, 0.0) + end - start - sum(named.values())
    beside: dict[str, float] = defaultdict(float)
    for spans_of_thread in (v for tid, v in annotations.items() if tid != main):
        for name, time in _covered(spans_of_thread, start, end):
            beside[name] += time
    for name, time in _covered(collectives, start, end):
        beside[name] += time
    rows = [
        Operator(name, kind, calls / len(steps), time / 1e3 / len(steps), time / (end - start))
        for (name, kind), (calls, time) in sorted(operators.items(), key=lambda item: -item[1][1])
    ]
    return TimeSplit(
        step_ms=(end - start) / 1e3 / len(steps),
        parts=tuple(part(*item) for item in named.items()),
        beside=tuple(part(*item) for item in sorted(beside.items())),
        matmul_share=sum(row.share for row in rows if row.kind == "matmul"),
        operators=tuple(rows),
    )


def _start(event: dict[str, Any]) -> float:
    return float(event["ts"])


def _end(event: dict[str, Any]) -> float:
    return float(event["ts"]) + float(event["dur"])


def _covered(spans: list[_Span], start: float, end: float) -> Iterator[tuple[str, float]]:
    """Yield (name, microseconds) of the time that each name takes between start and end.

    A moment belongs to the span of the highest priority that covers it; of several, to the one that began last.
    """
    edges = sorted({start, end, *(edge for span in spans for edge in span[:2] if start < edge < end)})
    waiting = sorted(spans, key=lambda span: span.start, reverse=True)
    open_spans: list[_Span] = []
    time: dict[str, float] = defaultdict(float)
    for left, right in pairwise(edges):
        while waiting and waiting[-1].start <= left:
            open_spans.append(waiting.pop())
        open_spans = [span for span in open_spans if span.end > left]
        if open_spans:
            time[max(open_spans, key=lambda span: (span.priority, span.start)).name] += right - left
    yield from time.items()


def _labelled(
    kernels: list[dict[str, Any]], events: list[dict[str, Any]], annotations: dict[Any, list[_Span]], main: Any
) -> list[_Span]:
    """Kernels as spans of the parts that launched them. The step's kernels hide collectives, which hide the loader's."""
    threads = {tid: _Thread(spans) for tid, spans in annotations.items()}
    threads.setdefault(main, _Thread([]))
    launches = {
        event["args"]["correlation"]: event
        for event in events
        if event["cat"] in ("cuda_runtime", "cuda_driver") and "correlation" in event.get("args", {})
    }
    spans = []
    for kernel in kernels:
        name, priority = OTHER, 2
        if _COLLECTIVE.match(kernel["name"]):
            name, priority = COMMUNICATION, 1
        elif launch := launches.get(kernel["args"].get("correlation")):
            own = threads[launch["tid"]].at(launch["ts"]) if launch["tid"] in threads else None
            name = own or threads[main].at(launch["ts"]) or OTHER
            priority = 0 if name in LOADER_PARTS else 2
        spans.append(_Span(_start(kernel), _end(kernel), name, priority))
    return spans


def _kernel_times(
    kernels: list[dict[str, Any]], events: list[dict[str, Any]]
) -> dict[tuple[str, Kind], tuple[int, float]]:
    """Sum up kernels: (name, kind) -> (calls, microseconds). A kernel is a matmul if its operator is one."""
    operators = {
        event["args"]["External id"]: event["name"]
        for event in events
        if event["cat"] == "cpu_op" and "External id" in event.get("args", {})
    }
    times: dict[tuple[str, Kind], tuple[int, float]] = {}
    for kernel in kernels:
        name = kernel["name"]
        kind: Kind = "other"
        if _COLLECTIVE.match(name):
            kind = "communication"
        elif _MATMUL_OPERATOR.search(operators.get(kernel["args"].get("External id"), "")) or _MATMUL_KERNEL.search(
            name
        ):
            kind = "matmul"
        calls, time = times.get((name, kind), (0, 0.0))
        times[name, kind] = calls + 1, time + kernel["dur"]
    return times


def _self_times(events: list[dict[str, Any]]) -> dict[tuple[str, Kind], tuple[int, float]]:
    """Sum up one thread's operators, without the operators that they call: (name, kind) -> (calls, microseconds)."""
    times: dict[tuple[str, Kind], tuple[int, float]] = {}

    def add(event: dict[str, Any], calls: int, time: float) -> None:
        if event["cat"] == "user_annotation":
            return
        name = event["name"]
        kind: Kind = "other"
        if _COLLECTIVE.match(name) or name.startswith("c10d::"):
            kind = "communication"
        elif _MATMUL_OPERATOR.search(name):
            kind = "matmul"
        so_far = times.get((name, kind), (0, 0.0))
        times[name, kind] = so_far[0] + calls, so_far[1] + time

    stack: list[dict[str, Any]] = []
    for event in sorted(events, key=lambda e: (_start(e), -_end(e))):
        while stack and _end(stack[-1]) <= _start(event):
            stack.pop()
        if stack:
            add(stack[-1], 0, -event["dur"])
        add(event, 1, event["dur"])
        stack.append(event)
    return times
