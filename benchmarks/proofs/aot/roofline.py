"""The least time that a GPU can need for some work: a bound from its data sheet, not a prediction."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.kernel_cases import Work


@dataclass(frozen=True)
class Peaks:
    """Of NVIDIA's data sheets, without sparsity, in bytes and floating-point operations per second."""

    memory: float
    half: float
    """Tensor cores, bf16 and fp16."""
    single: float
    """fp32 outside the tensor cores, which would round to TF32."""


PEAKS = {
    "A100": Peaks(memory=2.039e12, half=312e12, single=19.5e12),  # SXM, 80 GB
    "H100": Peaks(memory=3.35e12, half=989e12, single=67e12),  # SXM
}


@dataclass(frozen=True)
class Bound:
    microseconds: float
    limiter: str


def bound(work: Work, dtype: torch.dtype, gpu: str) -> Bound:
    """Memory or arithmetic, whichever takes longer if nothing else ever waits."""
    peaks = PEAKS[gpu]
    times = {
        "memory": work.bytes / peaks.memory,
        "arithmetic": work.flops / (peaks.single if dtype == torch.float32 else peaks.half),
    }
    limiter = max(times, key=lambda name: times[name])
    return Bound(1e6 * times[limiter], limiter)
