"""GPUs by their vendors' data sheets."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """From the vendor's data sheets."""

    name: str
    flops: float
    """Dense bf16, per second."""
    memory_bandwidth: float
    """Bytes per second."""
    nvlink: float
    """Bytes per second, in one direction."""


DEVICES = {
    "a100": Device("A100 80 GB SXM", 312e12, 2.0e12, 300e9),
    "h100": Device("H100 SXM", 989e12, 3.35e12, 450e9),
}
