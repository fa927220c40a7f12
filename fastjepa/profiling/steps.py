"""Profiles training steps, of a run's own loop (`StepProfiler`) or of a loop of its own (`profile_steps`).

After a warm-up come timed steps without torch.profiler. All figures of speed, and of memory on a GPU, come from them. Then a
few traced steps run under the profiler. Only shares, operators and the Chrome trace come from these, and on a CPU the memory
of activations.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch._C._profiler import _ExperimentalConfig
from torch.profiler import ProfilerActivity, profile, record_function

from fastjepa import distributed
from fastjepa.config.batch_sizes import BatchSizes
from fastjepa.data.loader import normalise
from fastjepa.data.order import batch_positions
from fastjepa.engine.base import Engine, resolve_precision
from fastjepa.objectives.base import Lengths, Method, Moment, Prepared, Tokens
from fastjepa.profiling.memory import Memory, measure_memory
from fastjepa.profiling.time_split import DATA_WAIT, STEP, TimeSplit, split_time
from fastjepa.profiling.timing import Ceilings, Timing, datasheet_teraflops, device_name, measure_ceilings, summary
from fastjepa.run.folder import explain_write_errors
from fastjepa.run.meter import peak_memory


class MicroBatch(Protocol):
    """The input of a micro step; `fastjepa.data.Batch` is one."""

    @property
    def prepared(self) -> Prepared: ...


B = TypeVar("B", bound=MicroBatch)


@dataclass(frozen=True)
class Steps:
    """Numbers of steps of each kind."""

    warmup: int = 5
    timed: int = 10
    traced: int = 3

    @property
    def total(self) -> int:
        """The most steps that a profile takes. The profiler needs one to warm up and, on a CPU, one for activations."""
        return self.warmup + self.timed + 2 + self.traced


DEFAULT_STEPS = Steps()


@dataclass(frozen=True)
class StepProfile:
    """Figures of one rank on its device. Only images and tokens per second are those of all ranks."""

    device: str
    on_gpu: bool
    precision: str
    threads: int
    ranks: int
    micro_batch_size: int
    grad_accum_steps: int
    step_ms: Timing
    """Time of a step, from the end of one to the end of the next."""
    steps_ms: tuple[float, ...]
    """Milliseconds of every timed step."""
    images_per_second: float
    tokens_per_second: float
    """All tokens that the method counts (`Prepared.counts`), as in metrics.jsonl."""
    data_wait: float
    """Share of the time in which the step waited for data; on a GPU, in which the GPU ran out of work meanwhile."""
    tokens: Mapping[str, float]
    """Tokens per image by kind: the mean over the timed steps."""
    teraflop_per_step: float
    """10^12 FLOPs of a step, on average: by formula from the length of every sequence, without recomputation."""
    teraflops: float
    """10^12 FLOPs per second that the steps reached."""
    ceilings: Ceilings
    mfu: float
    """`teraflops` as a share of the measured ceiling for matrix products in the same precision."""
    datasheet_teraflops: float | None
    """Peak by the data sheet; None if it is not known for this device and precision."""
    datasheet_mfu: float | None
    """`teraflops` as a share of it."""
    split: TimeSplit
    memory: Memory

    def as_dict(self, *, operators: bool = True) -> dict[str, Any]:
        """The profile for JSON. The list of operators is long: leave it out with `operators=False`."""
        split = self.split if operators else dataclasses.replace(self.split, operators=())
        return dataclasses.asdict(dataclasses.replace(self, split=split))


class StepProfiler:
    """Watches the steps of a training loop, which calls `step_done` after each optimizer step, on all ranks.

    It does not change what is learned: it only reads, and draws no random numbers.

    Args:
        engine: engine of the run.
        method: method of the run.
        sizes: batch sizes of the run.
        folder: an existing folder, for the ranks' Chrome traces.
        steps: numbers of steps.
        ceilings: ceilings of the machine. None: measure them now, which takes a second or so.
    """

    def __init__(
        self,
        engine: Engine,
        method: Method,
        sizes: BatchSizes,
        folder: Path,
        steps: Steps = DEFAULT_STEPS,
        ceilings: Ceilings | None = None,
    ) -> None:
        self._engine, self._method, self._sizes, self._steps = engine, method, sizes, steps
        rank = distributed.rank()
        self._trace = folder / (f"trace_rank{rank}.json" if rank else "trace.json")
        self._precision = resolve_precision(method.config, engine.device)
        self._ceilings = ceilings or measure_ceilings(engine.device, self._precision)
        torch.cuda.empty_cache()  # does nothing where there is no GPU
        self._clock = _Clock(engine.device)
        self._timing = False
        self._lengths: list[Lengths] = []
        self._counts: list[int] = []
        self._waits: list[tuple[Any, Any]] = []
        self._result: StepProfile | None = None
        self._phases = self._profile()
        next(self._phases)

    def watch(self, batches: Iterable[B]) -> Iterator[B]:
        """Pass the batches on, and measure how long the loop waits for each."""
        iterator = iter(batches)
        while True:
            asked = self._clock.now()
            with record_function(DATA_WAIT):
                batch = next(iterator, None)
            if batch is None:
                return
            if self._timing:
                self._waits.append((asked, self._clock.now()))
                self._lengths.append(batch.prepared.lengths())
                self._counts.append(sum(batch.prepared.counts.values()))
            yield batch

    def step_done(self) -> StepProfile | None:
        """Go on to the next phase. Returns the profile after the last step that it needs, None after all other steps."""
        before = self._result
        next(self._phases, None)
        return None if before else self._result

    def _profile(self) -> Iterator[None]:
        """The phases of the profile: a generator that is resumed after each step."""
        steps, device = self._steps, self._engine.device
        for _ in range(steps.warmup):
            yield
        clock = self._clock
        allocated_before = 0
        if clock.cuda:
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            allocated_before = torch.cuda.memory_allocated(device)
        marks = [clock.now()]
        self._timing = True
        for _ in range(steps.timed):
            yield
            marks.append(clock.now())
        self._timing = False
        times = clock.milliseconds(pairwise(marks))
        peak = peak_memory(device)
        activations = peak - allocated_before
        if not clock.cuda:
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as allocations:
                yield
            activations = _peak_allocated(allocations)
        activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * clock.cuda]
        # The threads of the loader and of collectives are traced too.
        all_threads = _ExperimentalConfig(profile_all_threads=True)
        with profile(activities=activities, experimental_config=all_threads) as profiler:
            yield  # not traced: the profiler's first step is slow
            clock.synchronize()
            for left in reversed(range(steps.traced)):
                with record_function(STEP):
                    yield
                    if not left:
                        clock.synchronize()
        with explain_write_errors(str(self._trace), "Choose another folder"):
            # The profiler is silent if it cannot write the file; then reading it fails.
            profiler.export_chrome_trace(str(self._trace))
            events = json.loads(self._trace.read_text(encoding="utf-8"))["traceEvents"]
        memory = measure_memory(self._engine, activations=activations, peak=peak)
        self._result = self._summary(times, split_time(events, self._method.stages), memory)

    def _summary(self, times: list[float], split: TimeSplit, memory: Memory) -> StepProfile:
        accum, device = self._sizes.accum, self._engine.device
        micro_batches = [(lengths, lengths.tokens()) for lengths in self._lengths]
        steps = [micro_batches[i : i + accum] for i in range(0, len(micro_batches), accum)]
        seconds = [ms / 1e3 for ms in times]

        def per_step(amount: Callable[[Lengths, Tokens], float]) -> list[float]:
            return [sum(amount(*micro_batch) for micro_batch in step) for step in steps]

        def rate(amounts: Sequence[float]) -> float:
            return statistics.median(amount / s for amount, s in zip(amounts, seconds, strict=True))

        images = per_step(lambda lengths, _: lengths.images)
        tokens = [sum(self._counts[i : i + accum]) for i in range(0, len(self._counts), accum)]
        flops = per_step(lambda lengths, tokens: lengths.images * self._method.step_flops(tokens, recomputed=False))
        mine = torch.tensor([sum(images), sum(tokens)], dtype=torch.float64, device=device)
        all_images, all_tokens = distributed.sum_over_ranks(mine)
        teraflops, datasheet = rate(flops) / 1e12, datasheet_teraflops(device, self._precision)
        return StepProfile(
            device=device_name(device),
            on_gpu=device.type == "cuda",
            precision=str(self._precision).removeprefix("torch."),
            threads=torch.get_num_threads(),
            ranks=distributed.world_size(),
            micro_batch_size=self._sizes.micro,
            grad_accum_steps=accum,
            step_ms=summary(times),
            steps_ms=tuple(times),
            images_per_second=rate(images) * all_images / sum(images),
            tokens_per_second=rate(tokens) * all_tokens / sum(tokens),
            data_wait=sum(self._clock.milliseconds(self._waits)) / sum(times),
            tokens=_mean([tokens for _, tokens in micro_batches]),
            teraflop_per_step=statistics.mean(flops) / 1e12,
            teraflops=teraflops,
            ceilings=self._ceilings,
            mfu=teraflops / self._ceilings.teraflops,
            datasheet_teraflops=datasheet,
            datasheet_mfu=teraflops / datasheet if datasheet else None,
            split=split,
            memory=memory,
        )


class _Clock:
    """Marks in time. On a GPU a mark is an event, reached when all work queued before it is done; the host does not wait."""

    def __init__(self, device: torch.device) -> None:
        self._device, self.cuda = device, device.type == "cuda"

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self._device)

    def now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self, spans: Iterable[tuple[Any, Any]]) -> list[float]:
        """Milliseconds from the first mark of each span to the second."""
        self.synchronize()
        return [a.elapsed_time(b) if self.cuda else 1e3 * (b - a) for a, b in spans]


def _peak_allocated(profiler: profile) -> int:
    """The most bytes of tensors that the step's thread had allocated on the CPU, above those from before the profile."""
    level = peak = 0
    recorded: Any = profiler.profiler  # the Chrome trace has these events too, but reading it takes longer
    for event in sorted(recorded.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            level += event.nbytes()
            peak = max(peak, level)
    return peak


def _mean(tokens: Sequence[Tokens]) -> dict[str, float]:
    """The mean of each kind of tokens."""
    rows = [each._asdict() for each in tokens]
    return {name: statistics.mean(row[name] for row in rows) for name in rows[0]}


class SyntheticBatch(NamedTuple):
    """A micro batch of synthetic images."""

    prepared: Prepared


def synthetic_batches(method: Method, sizes: BatchSizes, device: torch.device, steps: int) -> list[SyntheticBatch]:
    """Make micro batches for `steps` steps that need no loading: all have the same noise as images, and are prepared now."""
    config = method.config
    noise = torch.Generator().manual_seed(config.seed)
    views = []
    for view in method.views:
        shape = (sizes.micro, config.data.in_channels, *view.image_size)
        images = torch.randint(256, shape, generator=noise, dtype=torch.uint8).to(device)
        views.append(normalise(images, config.data) if config.data.pixels == "normalised" else images)

    def prepared(step: int, micro_step: int) -> Prepared:
        positions = batch_positions(
            step,
            micro_step,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            micro_batch_size=sizes.micro,
            accum=sizes.accum,
        )
        return method.prepare(views, torch.from_numpy(positions).to(device), Moment(step, steps, steps))

    return [SyntheticBatch(prepared(step, micro)) for step in range(steps) for micro in range(sizes.accum)]


def profile_steps(
    engine: Engine,
    method: Method,
    sizes: BatchSizes,
    batches: Iterable[MicroBatch],
    folder: Path,
    steps: Steps = DEFAULT_STEPS,
    ceilings: Ceilings | None = None,
) -> StepProfile:
    """Train on the first `steps.total * sizes.accum` of `batches`, and profile it (`StepProfiler`).

    Raises:
        ValueError: there are fewer batches.
    """
    profiler = StepProfiler(engine, method, sizes, folder, steps, ceilings)
    engine.model.train()
    for number, batch in enumerate(profiler.watch(batches), start=1):
        engine.micro_step(batch.prepared)
        if number % sizes.accum == 0 and (profiled := profiler.step_done()):
            return profiled
    raise ValueError(
        f"the batches ended before the profile was complete: it takes {steps.total} steps of {sizes.accum} micro batches"
    )
