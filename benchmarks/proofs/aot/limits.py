"""What the report holds the kernels to: the only place that says so.

A kernel without an entry is an error, so that no new one escapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from benchmarks.proofs.aot.compiled import Compiled
from benchmarks.proofs.aot.overflow import Interval


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


_STREAMING = Limits(wide_fraction=0.5)

# By "operation.kernel specialisation" and target; the first that matches counts.
LIMITS: list[tuple[str, str, Limits]] = [
    ("block_attention._delta_kernel *", "*", Limits()),
    ("block_attention._backward_*", "sm_80", Limits(tensor_cores=True, spill_bytes=24)),
    ("block_attention._backward_*", "gfx*", Limits(tensor_cores=True, spill_bytes=96)),
    ("block_attention.*", "*", Limits(tensor_cores=True)),
    # AMD's waves have 64 lanes: of the same tile, half the bytes fall to each.
    ("adamw_ema.*", "gfx*", Limits()),
    ("masked_gather.*", "gfx*", Limits()),
    ("target_loss.*", "gfx*", Limits()),
    # Buffers may end anywhere: beside the vectors there is a scalar path for the last block.
    ("adamw_ema.*", "sm_*", Limits(wide_fraction=0.1, blocks_per_sm=8)),
    # Patches of 14 pixels begin at multiples of 14: no access is wider than 8 bytes.
    ("masked_gather._gather_patches_kernel *PATCH=14*", "*", Limits()),
    ("masked_gather._gather_patches_kernel *", "*", Limits(wide_fraction=0.4)),
    ("masked_gather.*", "*", _STREAMING),
    ("target_loss.*", "sm_*", _STREAMING),
    # A few kilobytes in all: bound by latency, not by the width of accesses.
    ("mask_sampling.*", "*", Limits()),
]

MAX_TOKENS = 10**9
"""Of one batch: as many rows of the narrowest predictor (384 values of 2 bytes) are 768 GB."""

# What the integers of a kernel may be (`overflow.overflows`), by kernel: the first that matches counts.
BOUNDS: list[tuple[str, Mapping[str, Interval]]] = [
    (
        "block_attention.*",
        {
            "program_id(x)": Interval(0, 1023),  # heads x blocks of a sequence: 16 heads of 1,024 tokens by 16
            "*stride": Interval(0, 1 << 24),  # elements from a row to the next
            "[*]p_cu_*": Interval(0, MAX_TOKENS),
            "total*": Interval(0, MAX_TOKENS),
            "longest": Interval(0, 1 << 16),
        },
    ),
    (
        "mask_sampling.*",
        {
            "num_images": Interval(0, 1 << 24),
            "target_[hwc]*": Interval(0, 1 << 12),  # patches
            "context_[hw]": Interval(0, 1 << 12),
            "[*]p_*_lengths": Interval(0, 1 << 16),  # tokens of one image
            "[*]p_*_cu_seqlens": Interval(0, MAX_TOKENS),
        },
    ),
]


def limits_of(kernel: str, target: str) -> Limits:
    """`kernel`: with its specialisation."""
    for pattern, targets, limits in LIMITS:
        if fnmatchcase(kernel, pattern) and fnmatchcase(target, targets):
            return limits
    raise LookupError(f"{kernel} has no limits on {target}: state them in benchmarks/proofs/aot/limits.py")


def bounds_of(kernel: str) -> Mapping[str, Interval]:
    """None stated: every integer may be anything that its type holds."""
    return next((bounds for pattern, bounds in BOUNDS if fnmatchcase(kernel, pattern)), {})


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
