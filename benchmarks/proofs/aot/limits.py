"""The limits that the compiled kernels must keep. No other place states them.

A kernel without an entry is an error, so that no new kernel goes unchecked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from benchmarks.proofs.aot.compiled import Compiled
from benchmarks.proofs.aot.overflow import Interval


@dataclass(frozen=True)
class Limits:
    """Limits of a kernel on a target, in any configuration.

    Whatever they say, a kernel must fit, and ptxas must have no remarks on it.
    """

    spill_bytes: int = 0
    """The most bytes that it may spill."""
    wide_fraction: float = 0.0
    """The least share of global accesses that move at least 16 bytes per thread."""
    tensor_cores: bool = False
    """True if it must use tensor cores when an input is bf16 or fp16."""
    blocks_per_sm: int = 1
    """The fewest blocks that a multiprocessor must hold."""


_STREAMING = Limits(wide_fraction=0.5)

# Patterns of "operation.kernel specialisation" and of the target, with their limits. The first match counts.
LIMITS: list[tuple[str, str, Limits]] = [
    ("block_attention._delta_kernel *", "*", Limits()),
    ("block_attention._backward_*", "sm_80", Limits(tensor_cores=True, spill_bytes=24)),
    ("block_attention._backward_*", "gfx*", Limits(tensor_cores=True, spill_bytes=96)),
    ("block_attention.*", "*", Limits(tensor_cores=True)),
    # AMD's waves have 64 lanes, so each lane gets half the bytes of the same tile.
    ("adamw_ema.*", "gfx*", Limits()),
    ("masked_gather.*", "gfx*", Limits()),
    ("target_loss.*", "gfx*", Limits()),
    # Buffers may end anywhere, so the last block has a scalar path beside the vectors.
    ("adamw_ema.*", "sm_*", Limits(wide_fraction=0.1, blocks_per_sm=8)),
    # Patches of 14 pixels begin at multiples of 14: no access is wider than 8 bytes.
    ("masked_gather._gather_patches_kernel *PATCH=14*", "*", Limits()),
    ("masked_gather._gather_patches_kernel *", "*", Limits(wide_fraction=0.4)),
    ("masked_gather.*", "*", _STREAMING),
    ("target_loss.*", "sm_*", _STREAMING),
    # It moves a few kilobytes: latency bounds it, not the width of accesses.
    ("mask_sampling.*", "*", Limits()),
]

MAX_TOKENS = 10**9
"""Most tokens of a batch. So many rows of the narrowest predictor (384 values of 2 bytes) would take 768 GB."""

# Intervals of a kernel's integers for `overflow.overflows`, by a pattern of the kernel. The first match counts.
BOUNDS: list[tuple[str, Mapping[str, Interval]]] = [
    (
        "block_attention.*",
        {
            "program_id(x)": Interval(0, 1023),  # heads x blocks of a sequence: 16 heads, 1,024 tokens in blocks of 16
            "*stride": Interval(0, 1 << 24),  # elements from one row to the next
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
    """The limits of a kernel on a target.

    Args:
        kernel: "operation.kernel specialisation".
    """
    for pattern, targets, limits in LIMITS:
        if fnmatchcase(kernel, pattern) and fnmatchcase(target, targets):
            return limits
    raise LookupError(f"{kernel} has no limits on {target}: state them in benchmarks/proofs/aot/limits.py")


def bounds_of(kernel: str) -> Mapping[str, Interval]:
    """The stated intervals of a kernel's integers. Those without one may have any value of their type."""
    return next((bounds for pattern, bounds in BOUNDS if fnmatchcase(kernel, pattern)), {})


def broken_limits(compiled: Compiled, limits: Limits, *, half: bool) -> list[str]:
    """The limits that a compiled kernel breaks.

    Args:
        half: whether it reads bf16 or fp16.
    """
    found = []
    if not compiled.fits:
        found.append(f"does not fit: {compiled.shared_bytes} bytes of shared memory, limited by {compiled.limited_by}")
    elif compiled.blocks_per_sm < limits.blocks_per_sm:
        found.append(
            f"{compiled.blocks_per_sm} blocks per SM ({compiled.limited_by}), expected at least {limits.blocks_per_sm}"
        )
    if compiled.spill_bytes > limits.spill_bytes:
        found.append(f"spills {compiled.spill_bytes} bytes, expected at most {limits.spill_bytes}")
    if compiled.wide_fraction < limits.wide_fraction:
        found.append(
            f"{compiled.wide_fraction} of its accesses are 16 bytes wide, expected at least {limits.wide_fraction}"
        )
    if limits.tensor_cores and half and not compiled.mma:
        found.append("uses no tensor cores, expected for bf16 and fp16")
    found += [f"ptxas: {note}" for note in compiled.notes]
    return found
