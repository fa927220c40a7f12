"""Findings about a run, from made-up figures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastjepa.config import Config
from fastjepa.doctor import judge_run
from fastjepa.doctor.diagnosis import Finding
from fastjepa.doctor.limits import Link, find_limit
from fastjepa.doctor.probe_process import Outcome
from fastjepa.host import GIB
from fastjepa.objectives.ijepa.settings import IJEPAConfig
from tests.doctor.example_run import example_run, only

LOADER: dict[str, Any] = {"images": 8000, "val_images": 2000, "problem": None, "bad": []}
STEP: dict[str, Any] = {
    "ceiling_teraflops": 60.0,
    "estimated_images_per_second": 500.0,
    "rates": {"64": {"images_per_second": 480.0, "cpu_seconds": 0.001, "mfu": 0.5, "peak_bytes": 2 * GIB}},
}


def test_batches_say_how_a_step_is_divided() -> None:
    finding = only(judge_run.judge_batches(example_run(), []))
    assert finding.found == (
        "vit_small/16 trains 1 rank x 4 micro batches x 64 images per step, with plain PyTorch in bf16"
    )


def test_memory_is_that_of_the_formula_and_the_measured_peak() -> None:
    run = example_run()
    finding = only(judge_run.judge_memory(find_limit(run), "", run, Outcome(STEP)))
    assert finding.level == "ok"
    assert "70.0 GiB available; 2.0 GiB measured" in finding.found
    small = replace(run, memory=GIB)
    finding = only(judge_run.judge_memory(find_limit(small), "use a smaller model", small, Outcome(STEP)))
    assert finding.level == "problem"
    assert finding.found.startswith("a micro batch of 64 images needs")


def data_findings(**changes: Any) -> dict[str, Finding]:
    return {finding.name: finding for finding in judge_run.judge_data(example_run(), Outcome(LOADER | changes))}


def test_data_and_loader_are_described() -> None:
    found = data_findings()
    assert found["data"].found == "8,000 images, 2,000 held out; 31 steps per epoch"
    assert found["loader"].found.startswith("1,000 images/s with 4 threads, 1,900 images/s with 8 threads")


def test_bad_images_are_a_warning_and_too_few_images_a_problem() -> None:
    *_, bad = judge_run.judge_data(example_run(loader={}), Outcome(LOADER | {"bad": ["a.png: broken", "b.png: empty"]}))
    assert bad.level == "warning"
    assert bad.found == "2 bad images among those that were read; the first: a.png: broken"
    few = data_findings(images=50)["data"]
    assert few.level == "problem"
    assert "global_batch_size=50" in few.advice
    assert only(judge_run.judge_data(example_run(), Outcome({}, "ended with status 1"))).level == "problem"


def step_findings(**changes: Any) -> list[Finding]:
    run = example_run()
    return list(judge_run.judge_step(run, Outcome(STEP | changes), find_limit(run)))


def test_a_step_is_held_against_the_matrix_products_of_the_machine() -> None:
    finding = only(step_findings())
    assert finding.level == "ok"
    assert finding.found == (
        "480 images/s with micro batches of 64, measured alone: 50% of the 60 TFLOP/s that matrix products reach here"
    )


@pytest.mark.parametrize(("together", "level"), [(470.0, "ok"), (200.0, "warning")])
def test_loader_and_step_that_slow_one_another_down_are_a_warning(together: float, level: str) -> None:
    *_, finding = step_findings(with_loader={"images_per_second": together, "data_wait": 0.1})
    assert (finding.name, finding.level) == ("loader and step", level)
    assert "10% of the time the step waits for images" in finding.found


def test_a_step_that_runs_out_of_memory_or_time_or_crashes_is_reported() -> None:
    full = only(step_findings(rates={}, out_of_memory=64))
    assert full.level == "problem"
    assert "micro_batch_size=32" in full.advice
    slow = only(step_findings(rates={}, estimated_images_per_second=0.02))
    assert slow.level == "warning"
    assert "about 50 s per image" in slow.found
    run = example_run()
    crashed = only(judge_run.judge_step(run, Outcome({}, "ended by signal SIGSEGV"), find_limit(run)))
    assert crashed.level == "problem"


def test_communication_is_described_or_left_out() -> None:
    run = example_run(ranks=4, link=Link(1e9, 1e-4))
    finding = only(judge_run.judge_link(run, Outcome({"bytes_per_second": 1e9, "latency": 1e-4})))
    assert finding.level == "ok"
    assert "1.00 GB/s, latency 100 us, measured" in finding.found
    failed = only(judge_run.judge_link(replace(run, link=None), Outcome({}, "ended with status 1: 4 GPUs expected")))
    assert failed.level == "warning"
    assert not list(judge_run.judge_link(example_run(), Outcome({})))


@pytest.mark.parametrize(
    ("epochs", "expected"),
    [
        (0.16, "0.16 epochs of 8,000 images take about 2.7 seconds"),
        (1.0, "1 epoch of 8,000 images take about 17 seconds"),
        (600.0, "600 epochs of 8,000 images take about 2.8 hours"),
    ],
)
def test_the_duration_is_that_of_all_epochs(epochs: float, expected: str) -> None:
    run = example_run()
    run = replace(run, config=replace(run.config, epochs=epochs))
    assert judge_run.estimate_duration(run, find_limit(run), [], 8000, None) == expected


def test_the_duration_is_unknown_without_images() -> None:
    run = example_run()
    assert judge_run.estimate_duration(run, find_limit(run), [], 0, None) is None


def test_a_checkpoint_is_continued_from_unless_the_run_never_resumes(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step_00000004").mkdir(parents=True)
    named = tmp_path / "checkpoints" / "latest"
    named.write_text("step_00000004")

    def checkpoint(resume: str) -> Finding:
        config = Config(objective=IJEPAConfig(), output_dir=str(tmp_path), resume=resume)
        *_, finding = judge_run.judge_run_folder(config, 8000)
        return finding

    assert checkpoint("auto") == Finding("checkpoint", "ok", "the run continues from step_00000004")
    assert checkpoint("never").level == "problem"
    assert checkpoint("never").found.endswith("holds step_00000004, and resume = never")
    named.write_text("nothing of the kind")
    assert checkpoint("auto").level == "problem"


def test_a_disk_that_is_too_small_for_the_checkpoints_is_reported(tmp_path: Path) -> None:
    def output_dir(checkpoint: int, kept: int, held: int = 0) -> Finding:
        folder = tmp_path / "not" / "there"
        findings = list(judge_run.judge_disks(folder, tmp_path, checkpoint, kept, held, free=100 * GIB))
        assert not folder.exists()
        return findings[0]

    assert output_dir(GIB, 4).level == "ok"
    assert output_dir(30 * GIB, 4).level == "warning"
    assert output_dir(30 * GIB, 4, held=90 * GIB).level == "ok"  # held by a run that continues, which will delete them
    assert output_dir(120 * GIB, 4).level == "problem"


def test_folders_that_cannot_be_written_to_are_reported(read_only_folder: Path) -> None:
    output_dir, cache = judge_run.judge_disks(read_only_folder / "run", read_only_folder, 1, 4, 0)
    assert (output_dir.level, cache.level) == ("problem", "warning")
    assert "FASTJEPA_CACHE" in cache.advice
