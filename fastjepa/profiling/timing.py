"""Times functions in turns, so that whatever else the machine does affects all of them alike, and measures its ceilings."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from fastjepa.host import cpu_name
from fastjepa.plan.datasheets import DEVICES

NOISE = 0.05
"""Share of a speed below which a difference is within the error of measurements of seconds."""
_CACHE_BYTES = 256 << 20  # more than any GPU's last-level cache; written before each run, so that the run starts cold


def nothing() -> None:
    pass


@dataclass(frozen=True)
class Timed:
    """A function to time, and what to do before each call of it, outside the measured time."""

    run: Callable[[], object]
    prepare: Callable[[], object] = nothing


@dataclass(frozen=True)
class Timing:
    """Milliseconds: 20th, 50th and 80th percentile."""

    p20: float
    p50: float
    p80: float


def time_in_turns(
    functions: Mapping[str, Timed], device: torch.device, *, repeats: int, warmup: int = 3
) -> dict[str, Timing]:
    """Run `sample_in_turns` after `warmup` rounds that are not timed. Returns percentiles by name."""
    for _ in range(warmup):
        for function in functions.values():
            function.prepare()
            function.run()
    return {name: summary(times) for name, times in sample_in_turns(functions, device, repeats).items()}


def sample_in_turns(functions: Mapping[str, Timed], device: torch.device, rounds: int) -> dict[str, list[float]]:
    """Run every function once per round. Returns the milliseconds of all runs by name.

    On CUDA, events measure the time; caches are flushed before each run, and the host does not wait between runs.
    Elsewhere a clock measures it.
    """
    return (_time_on_gpu if device.type == "cuda" else _time_on_cpu)(functions, device, rounds)


def summary(times: list[float]) -> Timing:
    """Percentiles of times in milliseconds."""
    p20, p50, p80 = (statistics.quantiles(times, n=10, method="inclusive")[i] for i in (1, 4, 7))
    return Timing(p20, p50, p80)


def _time_on_cpu(functions: Mapping[str, Timed], device: torch.device, repeats: int) -> dict[str, list[float]]:
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            function.prepare()
            started = time.perf_counter()
            function.run()
            samples[name].append(1e3 * (time.perf_counter() - started))
    return samples


def _time_on_gpu(functions: Mapping[str, Timed], device: torch.device, repeats: int) -> dict[str, list[float]]:
    cache = torch.empty(_CACHE_BYTES, dtype=torch.int8, device=device)
    marks: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            function.prepare()
            torch.cuda._sleep(2_000_000)  # about a millisecond, so that the run is queued before the GPU gets to it
            cache.zero_()
            start.record()
            function.run()
            end.record()
            marks[name].append((start, end))
    torch.cuda.synchronize(device)
    return {name: [start.elapsed_time(end) for start, end in pairs] for name, pairs in marks.items()}


@dataclass(frozen=True)
class Ceilings:
    """The rates that this machine reaches on a plain copy and a plain matrix product."""

    gigabytes_per_second: float
    """10^9 bytes per second that a copy reads and writes."""
    teraflops: float
    """10^12 FLOPs per second of a large matrix product in the dtype of interest."""


@dataclass(frozen=True)
class CeilingWork:
    """The work whose rates are the ceilings. On a busy machine, time it in turns with what is compared to the ceilings."""

    functions: Mapping[str, Timed]
    bytes: int
    flops: int

    @staticmethod
    def on(device: torch.device, dtype: torch.dtype) -> CeilingWork:
        cuda = device.type == "cuda"
        numel = (1 << 28) if cuda else (1 << 24)
        source = torch.zeros(numel, dtype=torch.float32, device=device)
        target = torch.empty_like(source)
        n = 8192 if cuda else 1024
        # Leave the global generator alone: a run may be going on, and its random numbers must not change.
        random = torch.Generator(device).manual_seed(0)
        a, b = (torch.randn(n, n, device=device, generator=random).to(dtype) for _ in range(2))
        functions = {"copy": Timed(lambda: target.copy_(source)), "matmul": Timed(lambda: a @ b)}
        return CeilingWork(functions, 8 * numel, 2 * n**3)

    def ceilings(self, timings: Mapping[str, Timing]) -> Ceilings:
        """The ceilings that follow from timings of `functions`. Other timings in the mapping are ignored."""
        return Ceilings(self.bytes / timings["copy"].p50 / 1e6, self.flops / timings["matmul"].p50 / 1e9)


def measure_ceilings(device: torch.device, dtype: torch.dtype, *, repeats: int = 10) -> Ceilings:
    """Measure the ceilings of a device, for matrix products in `dtype`. Takes a second or so."""
    work = CeilingWork.on(device, dtype)
    return work.ceilings(time_in_turns(work.functions, device, repeats=repeats))


def device_name(device: torch.device) -> str:
    """Name of the GPU, or of the processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


# Parts of the names that the driver gives to GPUs, and the data sheet with their FLOP/s.
_DATASHEETS = {"A100": DEVICES["a100"], "H100 80GB HBM3": DEVICES["h100"], "H200": DEVICES["h100"]}


def datasheet_teraflops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Peak 10^12 FLOPs per second of dense matrix products by the data sheet. None if it is not known."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    found = [sheet for name, sheet in _DATASHEETS.items() if name in device_name(device)]
    return found[0].flops / 1e12 if found else None
