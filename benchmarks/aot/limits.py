"""What the report holds the kernels to: the only place that says so.

A kernel without an entry is an error, so that no new one escapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from benchmarks.aot.compiled import Compiled
from benchmarks.aot.overflow import Interval


@dataclass(frozen=True)
class Limits:
    """Of one kernel on one target, in any configuration. All kernels must fit, and ptxas may not have serialized any."""

    spill_bytes: int = 0
    """At most."""
    wide_fraction: float = 0.0
    """At least, of global accesses that move 16 bytes a thread or more."""
    tensor_cores: bool = False
    """Must use them if an input is bf16 or fp16."""
    blocks_per_sm: int = 1
    """At least."""


# By kernel and target; the first that matches counts.
LIMITS: list[tuple[str, str, Limits]] = []

MAX_TOKENS = 1 << 30
"""Of one batch: 2^30 rows of the narrowest predictor (384 values of 2 bytes) are 800 GB."""
MAX_STRIDE = (1 << 31) - 1

# What the integers of a kernel may be (`overflow.overflows`), by kernel.
BOUNDS: list[tuple[str, Mapping[str, Interval]]] = []


def limits_of(kernel: str, target: str) -> Limits:
    for pattern, targets, limits in LIMITS:
        if fnmatchcase(kernel, pattern) and fnmatchcase(target, targets):
            return limits
    raise LookupError(f"{kernel} has no limits on {target}: state them in benchmarks/aot/limits.py")


def bounds_of(kernel: str) -> dict[str, Interval]:
    """All entries that match, the first ones first."""
    return {
        name: bound
        for pattern, bounds in reversed(BOUNDS)
        if fnmatchcase(kernel, pattern)
        for name, bound in bounds.items()
    }


def broken_limits(compiled: Compiled, limits: Limits, *, half: bool) -> list[str]:
    """What `compiled` does not keep; `half`: it reads bf16 or fp16."""
    found = []
    if not compiled.fits:
        found.append(f"does not fit: {compiled.shared_bytes} bytes of shared memory, {compiled.limited_by}")
    elif compiled.blocks_per_sm < limits.blocks_per_sm:
        found.append(f"{compiled.blocks_per_sm} blocks per SM ({compiled.limited_by}), expected {limits.blocks_per_sm}")
    if compiled.spill_bytes > limits.spill_bytes:
        found.append(f"spills {compiled.spill_bytes} bytes, expected at most {limits.spill_bytes}")
    if compiled.wide_fraction < limits.wide_fraction:
        found.append(f"{compiled.wide_fraction} of its accesses are 16 bytes wide, expected {limits.wide_fraction}")
    if limits.tensor_cores and half and not compiled.mma:
        found.append("uses no tensor cores")
    found += [f"ptxas: {note}" for note in compiled.notes]
    return found
