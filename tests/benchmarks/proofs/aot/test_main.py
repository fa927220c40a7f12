"""python -m benchmarks.proofs.aot writes its report, and fails if a limit is broken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.proofs.aot import limits
from benchmarks.proofs.aot.__main__ import main
from benchmarks.proofs.aot.limits import Limits

pytestmark = pytest.mark.processes


def test_the_report_of_one_operation_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--ops", "adamw_ema", "--targets", "sm_80", "--jobs", "1", "--output", str(tmp_path)]
    assert main(arguments) == 0
    assert "all limits kept" in capsys.readouterr().out
    report = json.loads((tmp_path / "aot.json").read_text())
    assert {kernel["compiled"]["kernel"] for kernel in report["kernels"]} == {"_adamw_ema_kernel"}
    assert all(case["bounds"]["A100"]["microseconds"] > 0 for case in report["cases"])
    assert "_adamw_ema_kernel" in (tmp_path / "aot.md").read_text()
    assert (tmp_path / "aot.png").stat().st_size > 10_000


def test_a_broken_limit_makes_the_exit_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(limits, "LIMITS", [("*", "*", Limits(wide_fraction=1.1))])
    assert main(["--check", "--ops", "adamw_ema", "--targets", "sm_80", "--jobs", "1"]) == 1
    assert "BROKEN: adamw_ema._adamw_ema_kernel" in capsys.readouterr().out
