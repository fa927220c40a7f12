"""Peak rates of GPUs, from the vendors' data sheets."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """Peak rates of one kind of GPU."""

    name: str
    flops: float
    """Dense bf16 FLOPs per second."""
    memory_bandwidth: float
    """Bytes per second of the GPU's own memory."""
    nvlink: float
    """NVLink: bytes per second, in one direction."""


DEVICES = {
    "a100": Device("A100 80 GB SXM", 312e12, 2.0e12, 300e9),
    "h100": Device("H100 SXM", 989e12, 3.35e12, 450e9),
}
