"""Matrix products: mma.sync from hand-written fragments, and compiled kernels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.support.compiled_kernels import needs_compiler
from tests.support.edited_ptx import TARGETS, Product, edits
from tests.support.handwritten_ptx import Array, run


def fragment(matrix: Array) -> list[Array]:
    """Registers, as bits, of a row-major operand of mma.sync [16 or 8, 32 bytes], from the manual's figures.

    Lane 4g + t holds the t-th word of each 16 bytes of rows g and g + 8: the rows of a half first, then the other half.
    """
    rows = len(matrix)
    words = matrix.view(np.int32).reshape(rows, 2, 4)
    places = [(row, half) for half in (0, 1) for row in range(0, rows, 8)]
    return [np.array([words[row + lane // 4, half, lane % 4] for lane in range(32)]) for row, half in places]


def accumulator_places(register: int) -> tuple[list[int], list[int]]:
    """Row and column of each lane's element of D (or C) [16, 8]."""
    lanes = range(32)
    return [lane // 4 + 8 * (register // 2) for lane in lanes], [2 * (lane % 4) + register % 2 for lane in lanes]


@pytest.mark.parametrize(
    ("k", "type_", "dtype"),
    [(16, "bf16", torch.bfloat16), (16, "f16", torch.float16), (8, "tf32", torch.float32)],
    ids=["bf16", "f16", "tf32"],
)
def test_mma_is_a_matrix_product(k: int, type_: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, k, generator=generator).bfloat16().to(dtype) for n in (16, 8))  # b is transposed
    c = torch.randn(16, 8, generator=generator)
    words = torch.int32 if dtype == torch.float32 else torch.int16
    operands = [*fragment(a.view(words).numpy()), *fragment(b.view(words).numpy())]
    addends = [c[accumulator_places(i)].view(torch.int32).numpy() for i in range(4)]
    table, out = torch.from_numpy(np.stack([*operands, *addends])), torch.zeros(4, 32)
    loads = "".join(f"ld.global.b32 %r{i}, [%rd1+{128 * i}];" for i in range(10))
    stores = "".join(f"st.global.b32 [%rd2+{128 * i}], %r{20 + i};" for i in range(4))
    registers = "{%r20,%r21,%r22,%r23}, {%r0,%r1,%r2,%r3}, {%r4,%r5}, {%r6,%r7,%r8,%r9}"
    product = f"mma.sync.aligned.m16n8k{k}.row.col.f32.{type_}.{type_}.f32 {registers};"
    run(f"mad.wide.u32 %rd1, %r99, 4, %rd10; mad.wide.u32 %rd2, %r99, 4, %rd11; {loads} {product} {stores}", table, out)
    result = torch.empty(16, 8)
    for i in range(4):
        result[accumulator_places(i)] = out[i]
    torch.testing.assert_close(result.double(), a.double() @ b.double().T + c, rtol=1e-6, atol=1e-5)


@needs_compiler
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_compiled_matrix_products_are_right(target: str, dtype: torch.dtype) -> None:
    product = Product(target, dtype)
    assert ("wgmma" if target == "sm_90" else "mma.sync") in product.ptx
    assert product.error() < (0.05 if dtype == torch.float32 else 1e-4)  # f32: in tf32


@needs_compiler
@pytest.mark.parametrize(
    ("pattern", "replacement"),
    [
        (r"(mma\.sync\S+ \{.*?\}, \{ )(%r\d+), (%r\d+)", r"\1\3, \2"),
        (r"(mma\.sync\S+ \{.*?\}, \{.*?\}, \{ )(%r\d+), (%r\d+)", r"\1\3, \2"),
        (r"\.trans", ""),
        (r"(ldmatrix.*x4)\.shared", r"\1.trans.shared"),
    ],
    ids=["A's registers", "B's registers", "trans left out", "trans added"],
)
def test_a_wrong_fragment_gives_wrong_numbers(pattern: str, replacement: str) -> None:
    product = Product("sm_80", torch.bfloat16)
    assert product.error() < 1e-4
    for ptx in edits(product.ptx, pattern, replacement):
        assert product.error(ptx) > 1
