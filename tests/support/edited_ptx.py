"""Triton kernels whose compiled PTX tests of the simulator edit, to plant faults."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from benchmarks.proofs import ptxsim
from benchmarks.proofs.aot.launches import Launch, recorded

TARGETS = ["sm_80", "sm_90"]
BARRIER = r"\tbar\.sync \t0;"


@triton.jit
def copy_kernel(p_in, p_out, n, BLOCK: tl.constexpr):
    o_block = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_block = o_block < n
    tl.store(p_out + o_block, tl.load(p_in + o_block, mask=m_block), mask=m_block)


@triton.jit
def matmul_kernel(p_a, p_b, p_c, K, M: tl.constexpr, N: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr):
    """c = a @ b in a loop over K, so that the loads are pipelined."""
    o_m, o_n, o_k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BK)
    accumulator = tl.zeros((M, N), tl.float32)
    for k in tl.range(0, K, BK, num_stages=STAGES):
        a = tl.load(p_a + o_m[:, None] * K + (k + o_k)[None, :])  # [M, BK]
        b = tl.load(p_b + (k + o_k)[:, None] * N + o_n[None, :])  # [BK, N]
        accumulator = tl.dot(a, b, accumulator)
    tl.store(p_c + o_m[:, None] * N + o_n[None, :], accumulator)


def recorded_launch(target: str, kernel: Any, grid: tuple[int, ...], *arguments: Any, **constexprs: Any) -> Launch:
    """A launch, compiled for the target and not run."""
    with recorded(target) as launches:
        kernel[grid](*arguments, **constexprs)
    return launches[0]


def simulate(launch: Launch, ptx: str | None = None) -> dict[str, Any]:
    """Run a recorded launch on the CPU, with its own PTX or an edited one."""
    edited = ptx or launch.kernel.asm["ptx"]
    return ptxsim.run_ptx(edited, launch.kernel.metadata.shared, launch.grid, list(launch.arguments.values())).summary()


def edits(ptx: str, pattern: str, replacement: str) -> list[str]:
    """For every match of the pattern, the PTX with this match replaced."""
    found = [ptx[: m.start()] + m.expand(replacement) + ptx[m.end() :] for m in re.finditer(pattern, ptx)]
    assert found, pattern
    return found


def race_of(action: Callable[[str], object], ptx: str) -> str:
    """The message of the race in an edited PTX, or "" if there is none: compilers may set more barriers than needed."""
    try:
        action(ptx)
    except ptxsim.RaceFault as fault:
        return str(fault)
    return ""


class Product:
    """A compiled matrix product, and the error of its result."""

    def __init__(self, target: str, dtype: torch.dtype, k: int = 128) -> None:
        generator = torch.Generator().manual_seed(0)
        self.a, self.b = (
            torch.randn(64, k, generator=generator).to(dtype),
            torch.randn(k, 32, generator=generator).to(dtype),
        )
        self.c = torch.empty(64, 32)
        block = 16 if dtype == torch.float32 else 32
        self.launch = recorded_launch(
            target, matmul_kernel, (1,), self.a, self.b, self.c, k, M=64, N=32, BK=block, STAGES=3
        )
        self.ptx: str = self.launch.kernel.asm["ptx"]

    def error(self, ptx: str | None = None) -> float:
        self.c.fill_(torch.nan)
        simulate(self.launch, ptx)
        return (self.c.double() - self.a.double() @ self.b.double()).abs().max().item()
