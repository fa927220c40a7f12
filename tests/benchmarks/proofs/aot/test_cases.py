"""The cases that are compiled for absent GPUs cover all operations that have a Triton kernel."""

from __future__ import annotations

from benchmarks.proofs.aot.cases import all_cases
from fastjepa_kernels import OPERATIONS


def test_every_operation_with_a_triton_kernel_has_a_case() -> None:
    expected = {name for name, implementations in OPERATIONS.items() if "triton" in implementations}
    assert {case.op for case in all_cases()} == expected
