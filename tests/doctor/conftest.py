"""Probes that do not run but give the outcomes of a healthy run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fastjepa.doctor import __main__ as doctor
from fastjepa.doctor import examine
from fastjepa.doctor.probe_process import Outcome

HEALTHY: dict[str, dict[str, Any]] = {
    "pytorch": {"version": "2.13.0", "cuda": None, "threads": 2, "cpu_bf16": False, "gpus": [], "gpu_problem": None},
    "deepspeed": {"imported": True},
    "dali": {"problem": "nvidia.dali cannot be imported"},
    "apex": {"problem": None},
    "kernels": {"operations": [], "agreement": 0.0, "dtype": "float32"},
    "loader": {
        "images": 8000,
        "val_images": 2000,
        "problem": None,
        "bad": [],
        "rates": {"1": {"images_per_second": 310.0, "cpu_seconds": 0.0001}},
    },
    "step": {
        "ceiling_teraflops": 0.06,
        "estimated_images_per_second": 500.0,
        "rates": {"64": {"images_per_second": 480.0, "cpu_seconds": 0.0001, "mfu": 0.5, "peak_bytes": 2**29}},
    },
    "link": {"bytes_per_second": 1e9, "latency": 1e-4},
}


@pytest.fixture
def fake_probes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Outcome]:
    """Outcomes of a healthy run, given in place of those of real probes; a test may change them.

    The working directory, in which the run's folder would be, is tmp_path.
    """
    outcomes = {name: Outcome(result) for name, result in HEALTHY.items()}

    class FakeProcess:
        def __init__(self, name: str) -> None:
            self._name = name

        def __enter__(self) -> FakeProcess:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def outcome(self) -> Outcome:
            return outcomes[self._name]

    monkeypatch.setattr(doctor, "ProbeProcess", FakeProcess)
    monkeypatch.setattr(examine, "run_probe", lambda name, *_: outcomes[name])
    monkeypatch.chdir(tmp_path)
    return outcomes
