"""The least time in which a GPU can do some work: a bound from its data sheet, not a prediction."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.kernel_cases import Work


@dataclass(frozen=True)
class Peaks:
    """Peak rates from NVIDIA's data sheets, without sparsity, in bytes and floating-point operations per second."""

    memory: float
    half: float
    """bf16 and fp16 on tensor cores."""
    single: float
    """fp32 outside of the tensor cores, which would round to TF32."""


PEAKS = {
    "A100": Peaks(memory=2.039e12, half=312e12, single=19.5e12),  # SXM, 80 GB
    "H100": Peaks(memory=3.35e12, half=989e12, single=67e12),  # SXM
}


@dataclass(frozen=True)
class Bound:
    """The least time, and whether memory or arithmetic sets it."""

    microseconds: float
    limiter: str


def bound(work: Work, dtype: torch.dtype, gpu: str) -> Bound:
    """The time of memory or of arithmetic, whichever is longer, and its name."""
    peaks = PEAKS[gpu]
    times = {
        "memory": work.bytes / peaks.memory,
        "arithmetic": work.flops / (peaks.single if dtype == torch.float32 else peaks.half),
    }
    limiter = max(times, key=lambda name: times[name])
    return Bound(1e6 * times[limiter], limiter)
