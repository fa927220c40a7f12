"""The ahead-of-time report: what it reads from compiled kernels, and that each kind of limit can fail."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from benchmarks.aot import limits
from benchmarks.aot.__main__ import main
from benchmarks.aot.cases import Case
from benchmarks.aot.compiled import PROCESSORS, Compilations, Compiled, analyse, blocks_per_sm
from benchmarks.aot.launches import recorded
from benchmarks.aot.limits import Limits, broken_limits
from benchmarks.aot.report import Failure, Report, Variant, launched_kernels
from benchmarks.aot.roofline import bound
from benchmarks.kernel_cases import Work


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
    """Through shared memory: 4 * BLOCK^2 bytes."""
    o_row, o_col = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    tl.store(p_out + o_row * BLOCK + o_col, tl.trans(tl.load(p_in + o_row * BLOCK + o_col)))


def compiled(kernel: Any, *tensors: Any, target: str = "sm_90", log: str = "", **options: Any) -> Compiled:
    """`log`: what ptxas is made to say besides."""
    compilations = Compilations()
    with compilations.watched(), recorded(target) as launches:
        kernel[(1,)](*tensors, **options)
    facts = compilations.facts(launches[0].kernel)
    return analyse(launches[0].kernel, target, replace(facts, log=facts.log + log))


def copied(n: int = 4096, **options: Any) -> Compiled:
    return compiled(copy, torch.empty(4096), torch.empty(4096), n, **({"BLOCK": 1024} | options))


def multiplied(dtype: torch.dtype = torch.bfloat16, **options: Any) -> Compiled:
    a = torch.empty(128, 128, dtype=dtype)
    return compiled(product, a, a, torch.empty(128, 128), **({"BLOCK": 64} | options))


def test_counts_wide_accesses() -> None:
    assert copied().loads == {16: 2}
    assert copied().stores == {16: 2}
    assert copied().wide_fraction == 1
    assert copied(n=4095).loads == {4: 8}
    assert copied(n=4095).wide_fraction == 0


@pytest.mark.parametrize(
    ("target", "family"), [("sm_80", "mma"), ("sm_90", "wgmma"), ("sm_100", "tcgen05"), ("gfx942", "mfma")]
)
def test_counts_matrix_instructions(target: str, family: str) -> None:
    result = multiplied(target=target)
    assert result.mma > 0
    assert result.mma_family == family
    assert result.fits


def test_reads_kernels_that_were_compiled_before() -> None:
    """Triton's cache keeps the kernel, but not what ptxas said: the report must not take silence for a zero."""
    tensors = torch.empty(96), torch.empty(96)
    with recorded("sm_80") as launches:
        copy[(1,)](*tensors, 96, BLOCK=32, num_warps=1)
    before = launches[0].kernel
    assert analyse(before, "sm_80", Compilations().facts(before)).registers > 0


def test_reads_kernels_that_another_installation_compiled() -> None:
    """Triton's cache outlives the virtual environment that filled it, and names that one's libraries."""
    with recorded("sm_80") as launches:
        copy[(1,)](torch.empty(96), torch.empty(96), 96, BLOCK=64, num_warps=1)
    kernel = launches[0].kernel
    kernel.metadata = kernel.metadata._replace(extern_libs=[["libdevice", "/gone/libdevice.10.bc"]])
    assert analyse(kernel, "sm_80", Compilations().facts(kernel)).registers > 0


@pytest.mark.parametrize(
    ("target", "num_warps", "registers", "shared", "expected"),
    [
        ("sm_80", 8, 32, 0, 8),  # 64 warps
        ("sm_80", 4, 128, 0, 4),  # 65,536 / (128 * 128)
        ("sm_80", 4, 129, 0, 3),  # registers come in units of 256 a warp: 136 for each thread
        ("sm_80", 1, 16, 0, 32),  # 32 blocks
        ("sm_80", 4, 32, 100 << 10, 1),  # 164 KB
        ("sm_90", 4, 32, 100 << 10, 2),  # 228 KB
        ("sm_80", 4, 32, 163 << 10, 1),
        ("sm_80", 4, 32, (163 << 10) + 1, 0),
    ],
)
def test_occupancy(target: str, num_warps: int, registers: int, shared: int, expected: int) -> None:
    assert min(blocks_per_sm(PROCESSORS[target], num_warps, registers, shared, 0).values()) == expected


def broken(result: Compiled, *, half: bool = False, **stated: Any) -> str:
    return "\n".join(broken_limits(result, Limits(**stated), half=half))


def test_spills_break_a_limit() -> None:
    plenty, few = multiplied(target="sm_80"), multiplied(target="sm_80", maxnreg=40)
    assert broken(plenty) == ""
    assert few.spill_bytes > 0
    assert "spills" in broken(few)
    assert broken(few, spill_bytes=few.spill_bytes) == ""


def test_scalar_accesses_break_a_limit() -> None:
    assert broken(copied(), wide_fraction=1.0) == ""
    assert "16 bytes wide" in broken(copied(n=4095), wide_fraction=0.5)


def test_missing_tensor_cores_break_a_limit() -> None:
    assert broken(multiplied(), half=True, tensor_cores=True) == ""
    assert "tensor cores" in broken(copied(), half=True, tensor_cores=True)
    assert broken(copied(), half=False, tensor_cores=True) == ""


def test_too_much_shared_memory_breaks_a_limit() -> None:
    """The compiler does not object: only a launch would fail."""
    large = torch.empty(256, 256)
    result = compiled(transpose, large, large, BLOCK=256, num_warps=8, target="sm_80")
    assert result.shared_bytes > PROCESSORS["sm_80"].shared_bytes_per_block
    assert "does not fit" in broken(result)


def test_low_occupancy_breaks_a_limit() -> None:
    assert broken(copied(), blocks_per_sm=copied().blocks_per_sm) == ""
    assert "blocks per SM" in broken(copied(), blocks_per_sm=copied().blocks_per_sm + 1)


def test_serialized_matrix_instructions_break_a_limit() -> None:
    note = "Potential Performance Loss: wgmma.mma_async instructions are serialized due to a call in function 'product'"
    assert "serialized" in broken(multiplied(log=f"ptxas info    : (C7510) {note}\n"))


def variant(**changes: Any) -> Variant:
    return replace(Variant("target_loss", copied(), "float32", "num_warps=4", half=False), **changes)


def test_a_kernel_without_limits_breaks_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "LIMITS", [("target_loss.copy *", "sm_9*", Limits())])
    assert variant().broken() == []
    assert "has no limits" in variant(op="masked_gather").broken()[0]
    assert "has no limits" in variant(compiled=copied(target="sm_80")).broken()[0]


def test_an_overflow_breaks_the_limits_once() -> None:
    variants = [variant(overflows=("x",)), variant(overflows=("x",), compiled=copied(target="sm_80"))]
    assert [line for line in Report(variants, [], []).broken() if "overflow" in line] == [
        "target_loss.copy may overflow 32 bits: x"
    ]


def test_a_kernel_that_does_not_compile_breaks_the_limits() -> None:
    assert Report([], [Failure("case", "sm_90", "PassManager::run failed")], []).broken() != []


def test_a_kernel_that_no_case_launches_breaks_the_limits() -> None:
    case = Case("target_loss", "", torch.float32, lambda: None, Work(0))
    kernels = sorted(launched_kernels("target_loss"))
    assert kernels == ["target_loss._backward_kernel", "target_loss._forward_kernel"]
    assert [line.partition(":")[0] for line in Report([], [], [case]).broken()] == kernels


def test_bound_is_the_slower_of_memory_and_arithmetic() -> None:
    assert bound(Work(bytes=3_350_000), torch.bfloat16, "H100").microseconds == pytest.approx(1)
    assert bound(Work(bytes=3_350_000, flops=10**9), torch.bfloat16, "H100").limiter == "arithmetic"
    assert bound(Work(1, 67 * 10**6), torch.float32, "H100").microseconds == pytest.approx(1)


def test_report_of_one_operation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--ops", "adamw_ema", "--targets", "sm_80", "--jobs", "1", "--output", str(tmp_path)]
    assert main(arguments) == 0
    assert "all limits kept" in capsys.readouterr().out
    report = json.loads((tmp_path / "aot.json").read_text())
    assert {kernel["compiled"]["kernel"] for kernel in report["kernels"]} == {"_adamw_ema_kernel"}
    assert all(case["bounds"]["A100"]["microseconds"] > 0 for case in report["cases"])
    assert "_adamw_ema_kernel" in (tmp_path / "aot.md").read_text()
    assert (tmp_path / "aot.png").stat().st_size > 10_000


def test_a_broken_limit_is_an_exit_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(limits, "LIMITS", [("*", "*", Limits(wide_fraction=1.1))])
    assert main(["--check", "--ops", "adamw_ema", "--targets", "sm_80", "--jobs", "1"]) == 1
    assert "BROKEN: adamw_ema._adamw_ema_kernel" in capsys.readouterr().out
