"""What is said of an installation and a machine: every fault is told apart, with what was expected and what to do."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastjepa.doctor import installation
from fastjepa.doctor.installation import Finding, Host
from fastjepa.doctor.probes import Outcome, outcome_of

GIB = 2**30
HOST = Host(
    python="3.11.7",
    system="Linux x86_64",
    requirements={"torch": (">=2.13", "2.13.0+cpu"), "triton": (">=3.5", "3.8.0"), "deepspeed": (">=0.19.8", "0.19.8")},
    apex_is_there=False,
    nvidia_driver=None,
    cores=8.0,
    busy=0.0,
    memory=64 * GIB,
    omp_num_threads=None,
    shm=16 * GIB,
)
TORCH: dict[str, Any] = {
    "version": "2.13.0",
    "cuda": "13.0",
    "threads": 8,
    "cpu_bf16": False,
    "gpus": [],
    "gpu_problem": None,
}
GPU = {"name": "NVIDIA H100", "capability": [9, 0], "memory": 80 * GIB, "free": 79 * GIB}


def only(findings: Any) -> Finding:
    (finding,) = findings
    assert isinstance(finding, Finding)
    assert finding.level == "ok" or finding.advice, "what is wrong comes with what to do"
    return finding


@pytest.fixture
def shadowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which probes find packages before the installed ones."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, sys.path)]))
    return tmp_path


def write_package(folder: Path, name: str, text: str = "") -> None:
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(text)


def test_the_apex_of_pypi_is_told_from_nvidias(shadowed: Path) -> None:
    write_package(shadowed, "apex")
    finding = only(installation.judge_apex(outcome_of("apex", {})))
    assert finding.level == "warning"
    assert "not NVIDIA's (PyPI's is a Pyramid toolkit)" in finding.found


def test_the_placeholder_of_dali_is_recognised(shadowed: Path) -> None:
    write_package(shadowed, "nvidia/dali")
    (shadowed / "nvidia" / "__init__.py").touch()
    outcome = outcome_of("dali", {})
    asked_for = only(installation.judge_dali(outcome, loader="dali", gpu=False))
    assert asked_for.level == "problem"
    assert "empty placeholder, version 0.0.0" in asked_for.found
    assert "data.loader=turbo" in asked_for.advice
    assert only(installation.judge_dali(outcome, loader="auto", gpu=True)).level == "warning"
    assert only(installation.judge_dali(outcome, loader="auto", gpu=False)).level == "ok"  # nobody asks for it


def test_dali_decodes_as_libjpeg_turbo_does() -> None:
    pytest.importorskip("nvidia.dali", reason="needs DALI")
    assert only(installation.judge_dali(outcome_of("dali", {"rounds": 2}), loader="dali", gpu=False)).level == "ok"


@pytest.mark.gpu
def test_dali_decodes_on_the_gpu_as_libjpeg_turbo_does() -> None:
    outcome = outcome_of("dali", {})
    assert outcome.result["device"] == "cuda"
    assert only(installation.judge_dali(outcome, loader="auto", gpu=True)).level == "ok"


@pytest.mark.parametrize(("difference", "unlike"), [(7.0, 0.0), (0.1, 3.0)])
def test_a_decoder_that_is_wrong_or_races_is_a_problem(difference: float, unlike: float) -> None:
    outcome = Outcome({"problem": None, "device": "cuda", "difference": difference, "unlike": unlike})
    finding = only(installation.judge_dali(outcome, loader="auto", gpu=True))
    assert finding.level == "problem"
    assert "data.hw_decoder_load=0" in finding.advice


def test_a_dali_that_crashes_is_a_problem_where_it_would_be_used() -> None:
    crashed = Outcome({}, "ended by signal SIGSEGV: without a word")
    assert only(installation.judge_dali(crashed, loader="auto", gpu=True)).level == "problem"
    assert only(installation.judge_dali(crashed, loader="turbo", gpu=True)).level == "ok"


def by_name(findings: Any) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def test_requirements_that_are_missing_or_old() -> None:
    old: dict[str, tuple[str, str | None]] = {
        "torch": (">=2.13", "2.9.1"),
        "triton": (">=3.5", None),
        "simplejpeg": (">=1.8", None),
        "numpy": (">=1.26", "2.4"),
    }
    found = by_name(installation.judge_host(replace(HOST, requirements=old)))
    assert {name: finding.level for name, finding in found.items()} == {
        "Python": "ok",
        "torch": "warning",
        "triton": "warning",  # PyTorch's paths run without it
        "simplejpeg": "problem",
        "packages": "ok",
    }
    assert "2.9.1, expected >=2.13" in found["torch"].found
    assert found["packages"].found == "numpy 2.4"
    assert by_name(installation.judge_host(replace(HOST, requirements=None)))["packages"].level == "warning"


def test_gpus_that_are_there_but_of_no_use_are_said_why() -> None:
    def gpu(driver: str | None = None, **facts: Any) -> Finding:
        found = by_name(installation.judge_pytorch(Outcome(TORCH | facts), replace(HOST, nvidia_driver=driver)))
        return found.get("GPU") or found["GPU 0"]

    assert gpu(gpus=[GPU]).level == "ok"
    assert "another process" in gpu(gpus=[GPU | {"free": 20 * GIB}]).advice
    assert "8.0 or newer" in gpu(gpus=[GPU | {"capability": [7, 5]}]).advice
    assert "driver is too old" in gpu(gpu_problem="The NVIDIA driver is too old").found
    assert "a CUDA build" in gpu("NVRM version: 580", cuda=None).advice
    assert gpu(cuda=None).level == "ok"
    assert only(installation.judge_pytorch(Outcome({}, "did not end within 60 s"), HOST)).level == "problem"


def kernel(operation: str = "target_loss", **entry: Any) -> dict[str, Any]:
    return {"operation": operation, "head_dim": 0, **entry}


def test_kernels_are_named_with_the_reasons_of_the_others() -> None:
    entry = kernel(chosen="torch", others={"triton": "triton is not installed"})
    facts = {"operations": [entry], "agreement": 0.0, "dtype": "bfloat16"}
    on_cpu, _ = installation.judge_kernels(Outcome(facts), gpu=False)
    assert (on_cpu.level, on_cpu.found) == ("ok", "torch; not triton: triton is not installed")
    on_gpu, _ = installation.judge_kernels(Outcome(facts), gpu=True)
    assert on_gpu.level == "warning"
    *_, agreement = installation.judge_kernels(Outcome(facts | {"agreement": 0.3}), gpu=True)
    assert agreement.level == "problem"
    assert "another loss" in agreement.found
    *_, nan = installation.judge_kernels(Outcome(facts | {"agreement": float("nan")}), gpu=True)
    assert nan.level == "problem"
    assert only(installation.judge_kernels(Outcome({}, "ended"), gpu=True)).level == "problem"


def test_a_wish_that_cannot_run_is_told_once() -> None:
    entries = [kernel(op, problem="FASTJEPA_KERNELS=x: expected ...") for op in ("masked_gather", "target_loss")]
    finding = only(installation.judge_kernels(Outcome({"operations": entries, "agreement": None}), gpu=False))
    assert finding.level == "problem"


def test_the_kernels_of_this_machine_agree_with_the_plain_paths() -> None:
    outcome = outcome_of("kernels", {"settings": (None, [])})
    assert outcome.failure is None
    assert outcome.result["agreement"] < 1e-4
    assert all("chosen" in entry for entry in outcome.result["operations"])


@pytest.mark.gpu
def test_the_kernels_of_a_gpu_are_tritons_and_agree_with_the_plain_paths() -> None:
    outcome = outcome_of("kernels", {"settings": (None, [])})
    chosen = {entry["operation"]: entry["chosen"] for entry in outcome.result["operations"]}
    assert chosen.pop("linear") == "torch"
    assert set(chosen.values()) == {"triton"}
    assert outcome.result["agreement"] < 1e-2


@pytest.mark.parametrize(
    ("cores", "omp", "threads", "ranks", "level"),
    [
        (8.0, None, 8, 1, "ok"),
        (2.0, None, 8, 1, "warning"),  # torch does not see the quota of a container
        (8.0, "8", 8, 4, "warning"),
        (8.0, None, 8, 4, "ok"),  # train.py shares them out
        (2.0, "1", 1, 3, "warning"),
        (0.5, None, 1, 1, "ok"),
    ],
)
def test_threads_beyond_the_cores(cores: float, omp: str | None, threads: int, ranks: int, level: str) -> None:
    host = replace(HOST, cores=cores, omp_num_threads=omp)
    assert only(installation.judge_cpu(host, threads, ranks, gpu=False)).level == level


def test_other_processes_are_told_for_what_they_take() -> None:
    found = by_name(installation.judge_cpu(replace(HOST, busy=4.2), 8, 1, gpu=False))
    assert found["other processes"].level == "warning"
    assert "keep 4.2 of 8 cores busy" in found["other processes"].found
    assert "other processes" not in by_name(installation.judge_cpu(replace(HOST, busy=None), 8, 1, gpu=False))


def test_a_small_shm_counts_where_several_gpus_talk() -> None:
    small = replace(HOST, shm=64 * 2**20)
    assert only(installation.judge_shm(small, 8, gpu=True)).level == "warning"
    assert only(installation.judge_shm(HOST, 8, gpu=True)).level == "ok"
    assert not list(installation.judge_shm(small, 8, gpu=False))


def test_disks_that_are_too_small(tmp_path: Path) -> None:
    def output_dir(checkpoint: int, kept: int, held: int = 0) -> Finding:
        folder = tmp_path / "not" / "there"
        findings = list(installation.judge_folders(folder, tmp_path, checkpoint, kept, held, free=100 * GIB))
        assert not folder.exists()
        return findings[0]

    assert output_dir(GIB, 4).level == "ok"
    assert output_dir(30 * GIB, 4).level == "warning"
    assert output_dir(30 * GIB, 4, held=90 * GIB).level == "ok"  # of a run that goes on: they will be deleted
    assert output_dir(120 * GIB, 4).level == "problem"


def test_folders_that_cannot_be_written_to(read_only_folder: Path) -> None:
    output_dir, cache = installation.judge_folders(read_only_folder / "run", read_only_folder, 1, 4, 0)
    assert (output_dir.level, cache.level) == ("problem", "warning")
    assert "FASTJEPA_CACHE" in cache.advice
