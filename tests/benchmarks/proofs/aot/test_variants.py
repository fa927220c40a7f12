"""A report names broken limits, overflows, failures to compile, and kernels that no case launches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.kernel_cases import Work
from benchmarks.proofs.aot import limits
from benchmarks.proofs.aot.cases import Case
from benchmarks.proofs.aot.limits import Limits
from benchmarks.proofs.aot.variants import Failure, Report, Variant, launched_kernels
from tests.support.compiled_kernels import copied


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
