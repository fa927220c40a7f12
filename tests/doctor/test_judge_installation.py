"""Findings about an installation and a machine: every fault has its own, with what was expected and what to do."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fastjepa.doctor import judge_installation
from fastjepa.doctor.diagnosis import Finding
from fastjepa.doctor.host_facts import HostFacts
from fastjepa.doctor.probe_process import Outcome
from fastjepa.host import GIB
from tests.doctor.example_run import only

HOST = HostFacts(
    python="3.11.7",
    system="Linux x86_64",
    requirements={"torch": (">=2.13", "2.13.0+cpu"), "triton": (">=3.5", "3.8.0"), "deepspeed": (">=0.19.8", "0.19.8")},
    has_apex=False,
    nvidia_driver=None,
    cores=8.0,
    cores_taken=0.0,
    memory=64 * GIB,
    omp_num_threads=None,
    shm_free=16 * GIB,
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


@pytest.mark.parametrize(("difference", "spread"), [(7.0, 0.0), (0.1, 3.0)])
def test_a_decoder_that_is_wrong_or_races_is_a_problem(difference: float, spread: float) -> None:
    outcome = Outcome({"problem": None, "device": "cuda", "difference": difference, "spread": spread})
    finding = only(judge_installation.judge_dali(outcome, loader="auto", gpu=True))
    assert finding.level == "problem"
    assert "data.hw_decoder_load=0" in finding.advice


def test_a_dali_that_crashes_is_a_problem_where_it_would_be_used() -> None:
    crashed = Outcome({}, "ended by signal SIGSEGV: it printed nothing")
    assert only(judge_installation.judge_dali(crashed, loader="auto", gpu=True)).level == "problem"
    assert only(judge_installation.judge_dali(crashed, loader="turbo", gpu=True)).level == "ok"


def by_name(findings: Any) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def test_missing_and_old_requirements_are_told_apart() -> None:
    old: dict[str, tuple[str, str | None]] = {
        "torch": (">=2.13", "2.9.1"),
        "triton": (">=3.5", None),
        "simplejpeg": (">=1.8", None),
        "numpy": (">=1.26", "2.4"),
    }
    found = by_name(judge_installation.judge_host(replace(HOST, requirements=old)))
    assert {name: finding.level for name, finding in found.items()} == {
        "Python": "ok",
        "torch": "warning",
        "triton": "warning",  # plain PyTorch runs without it
        "simplejpeg": "problem",
        "packages": "ok",
    }
    assert "2.9.1, expected >=2.13" in found["torch"].found
    assert found["packages"].found == "numpy 2.4"
    assert by_name(judge_installation.judge_host(replace(HOST, requirements=None)))["packages"].level == "warning"


def test_a_gpu_that_cannot_be_used_comes_with_the_reason() -> None:
    def gpu(driver: str | None = None, **facts: Any) -> Finding:
        found = by_name(judge_installation.judge_pytorch(Outcome(TORCH | facts), replace(HOST, nvidia_driver=driver)))
        return found.get("GPU") or found["GPU 0"]

    assert gpu(gpus=[GPU]).level == "ok"
    assert "another process" in gpu(gpus=[GPU | {"free": 20 * GIB}]).advice
    assert "8.0 or newer" in gpu(gpus=[GPU | {"capability": [7, 5]}]).advice
    assert "driver is too old" in gpu(gpu_problem="The NVIDIA driver is too old").found
    assert "a CUDA build" in gpu("NVRM version: 580", cuda=None).advice
    assert gpu(cuda=None).level == "ok"
    assert only(judge_installation.judge_pytorch(Outcome({}, "did not end within 60 s"), HOST)).level == "problem"


def kernel(operation: str = "target_loss", **entry: Any) -> dict[str, Any]:
    return {"operation": operation, "head_dim": 0, **entry}


def test_the_chosen_kernels_are_named_with_the_reasons_against_the_others() -> None:
    entry = kernel(chosen="torch", others={"triton": "triton is not installed"})
    facts = {"operations": [entry], "agreement": 0.0, "dtype": "bfloat16"}
    on_cpu, _ = judge_installation.judge_kernels(Outcome(facts), gpu=False)
    assert (on_cpu.level, on_cpu.found) == ("ok", "runs on torch; not on triton: triton is not installed")
    on_gpu, _ = judge_installation.judge_kernels(Outcome(facts), gpu=True)
    assert on_gpu.level == "warning"
    *_, agreement = judge_installation.judge_kernels(Outcome(facts | {"agreement": 0.3}), gpu=True)
    assert agreement.level == "problem"
    assert "another loss" in agreement.found
    *_, nan = judge_installation.judge_kernels(Outcome(facts | {"agreement": float("nan")}), gpu=True)
    assert nan.level == "problem"
    assert only(judge_installation.judge_kernels(Outcome({}, "ended"), gpu=True)).level == "problem"


def test_a_wrong_fastjepa_kernels_is_reported_once_not_for_every_operation() -> None:
    entries = [kernel(op, problem="FASTJEPA_KERNELS=x: expected ...") for op in ("masked_gather", "target_loss")]
    finding = only(judge_installation.judge_kernels(Outcome({"operations": entries, "agreement": None}), gpu=False))
    assert finding.level == "problem"


@pytest.mark.parametrize(
    ("cores", "omp", "threads", "ranks", "level"),
    [
        (8.0, None, 8, 1, "ok"),
        (2.0, None, 8, 1, "warning"),  # torch does not see the quota of a container
        (8.0, "8", 8, 4, "warning"),
        (8.0, None, 8, 4, "ok"),  # train.py divides the threads among the ranks
        (2.0, "1", 1, 3, "warning"),
        (0.5, None, 1, 1, "ok"),
    ],
)
def test_more_threads_or_ranks_than_cores_are_a_warning(
    cores: float, omp: str | None, threads: int, ranks: int, level: str
) -> None:
    host = replace(HOST, cores=cores, omp_num_threads=omp)
    assert only(judge_installation.judge_cpu(host, threads, ranks, gpu=False)).level == level


def test_other_processes_that_keep_cores_busy_are_a_warning() -> None:
    found = by_name(judge_installation.judge_cpu(replace(HOST, cores_taken=4.2), 8, 1, gpu=False))
    assert found["other processes"].level == "warning"
    assert "keep 4.2 of 8 cores busy" in found["other processes"].found
    assert "other processes" not in by_name(
        judge_installation.judge_cpu(replace(HOST, cores_taken=None), 8, 1, gpu=False)
    )


def test_a_small_shm_is_a_warning_only_where_several_gpus_talk() -> None:
    small = replace(HOST, shm_free=64 * 2**20)
    assert only(judge_installation.judge_shm(small, 8, gpu=True)).level == "warning"
    assert only(judge_installation.judge_shm(HOST, 8, gpu=True)).level == "ok"
    assert not list(judge_installation.judge_shm(small, 8, gpu=False))
