"""Small Triton kernels, compiled and analysed, for tests of benchmarks.proofs.aot."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from benchmarks.proofs.aot.compiled import Compilations, Compiled, analyse
from benchmarks.proofs.aot.launches import recorded

needs_compiler = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="needs Triton's compiler")


@triton.jit
def copy(p_in, p_out, n, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(p_out + o, tl.load(p_in + o, mask=o < n, other=0), mask=o < n)


@triton.jit
def product(p_a, p_b, p_out, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(p_out + o, tl.dot(tl.load(p_a + o), tl.load(p_b + o)))


@triton.jit
def transpose(p_in, p_out, BLOCK: tl.constexpr):
    """Transpose through shared memory, which takes 4 * BLOCK^2 bytes."""
    o_row, o_col = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    tl.store(p_out + o_row * BLOCK + o_col, tl.trans(tl.load(p_in + o_row * BLOCK + o_col)))


def compiled(kernel: Any, *tensors: Any, target: str = "sm_90", log: str = "", **options: Any) -> Compiled:
    """Compile and analyse a launch.

    Args:
        log: text that is added to ptxas's log.
    """
    compilations = Compilations()
    with compilations.watched(), recorded(target) as launches:
        kernel[(1,)](*tensors, **options)
    facts = compilations.facts(launches[0].kernel)
    return analyse(launches[0].kernel, target, replace(facts, log=facts.log + log))


def copied(n: int = 4096, **options: Any) -> Compiled:
    """The kernel `copy`, compiled for n elements."""
    return compiled(copy, torch.empty(4096), torch.empty(4096), n, **({"BLOCK": 1024} | options))


def multiplied(dtype: torch.dtype = torch.bfloat16, **options: Any) -> Compiled:
    """The kernel `product`, compiled for a dtype."""
    a = torch.empty(128, 128, dtype=dtype)
    return compiled(product, a, a, torch.empty(128, 128), **({"BLOCK": 64} | options))
