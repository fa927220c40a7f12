"""The probes of the installation, each in its process, and what is found from them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from fastjepa.doctor import judge_installation
from fastjepa.doctor.probe_process import run_probe
from tests.doctor.example_run import only

pytestmark = pytest.mark.processes


@pytest.fixture
def shadow_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose packages the probes find before the installed ones."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, sys.path)]))
    return tmp_path


def write_package(folder: Path, name: str, text: str = "") -> None:
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(text)


def test_the_apex_of_pypi_is_not_taken_for_nvidias(shadow_folder: Path) -> None:
    write_package(shadow_folder, "apex")
    finding = only(judge_installation.judge_apex(run_probe("apex", {})))
    assert finding.level == "warning"
    assert "not NVIDIA's (PyPI's is a Pyramid toolkit)" in finding.found


def test_the_empty_placeholder_package_of_dali_is_recognised(shadow_folder: Path) -> None:
    write_package(shadow_folder, "nvidia/dali")
    (shadow_folder / "nvidia" / "__init__.py").touch()
    outcome = run_probe("dali", {})
    asked_for = only(judge_installation.judge_dali(outcome, loader="dali", gpu=False))
    assert asked_for.level == "problem"
    assert "empty placeholder, version 0.0.0" in asked_for.found
    assert "data.loader=turbo" in asked_for.advice
    assert only(judge_installation.judge_dali(outcome, loader="auto", gpu=True)).level == "warning"
    assert only(judge_installation.judge_dali(outcome, loader="auto", gpu=False)).level == "ok"  # not used


def test_dali_decodes_as_libjpeg_turbo_does() -> None:
    pytest.importorskip("nvidia.dali", reason="needs DALI")
    assert only(judge_installation.judge_dali(run_probe("dali", {"rounds": 2}), loader="dali", gpu=False)).level == "ok"


@pytest.mark.gpu
def test_dali_decodes_on_the_gpu_as_libjpeg_turbo_does() -> None:
    outcome = run_probe("dali", {})
    assert outcome.result["device"] == "cuda"
    assert only(judge_installation.judge_dali(outcome, loader="auto", gpu=True)).level == "ok"


def test_the_kernels_of_this_machine_agree_with_plain_pytorch() -> None:
    outcome = run_probe("kernels", {"settings": (None, [])})
    assert outcome.failure is None
    assert outcome.result["agreement"] < 1e-4
    assert all("chosen" in entry for entry in outcome.result["operations"])


@pytest.mark.gpu
def test_the_kernels_of_a_gpu_are_tritons_and_agree_with_plain_pytorch() -> None:
    outcome = run_probe("kernels", {"settings": (None, [])})
    chosen = {entry["operation"]: entry["chosen"] for entry in outcome.result["operations"]}
    assert chosen.pop("linear") == "torch"
    assert set(chosen.values()) == {"triton"}
    assert outcome.result["agreement"] < 1e-2


def test_pytorch_and_deepspeed_are_imported() -> None:
    pytest.importorskip("deepspeed", reason="needs DeepSpeed")
    outcome = run_probe("pytorch", {})
    assert outcome.failure is None
    assert outcome.result["threads"] >= 1
    assert "import_problem" not in outcome.result
    assert run_probe("deepspeed", {}).result == {"imported": True}
