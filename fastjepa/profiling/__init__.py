"""Measures the time, the FLOPs and the memory of a training step on this machine, and what they are spent on."""

from fastjepa.profiling.memory import Memory
from fastjepa.profiling.steps import (
    DEFAULT_STEPS,
    MicroBatch,
    StepProfile,
    StepProfiler,
    Steps,
    SyntheticBatch,
    profile_steps,
    synthetic_batches,
)
from fastjepa.profiling.time_split import Operator, Part, TimeSplit
from fastjepa.profiling.timing import Ceilings, Timing, measure_ceilings

__all__ = [
    "DEFAULT_STEPS", "Ceilings", "Memory", "MicroBatch", "Operator", "Part", "StepProfile", "StepProfiler", "Steps",
    "SyntheticBatch", "TimeSplit", "Timing", "measure_ceilings", "profile_steps", "synthetic_batches",
]  # fmt: skip
