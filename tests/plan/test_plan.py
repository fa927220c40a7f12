"""python -m fastjepa.plan."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.launch import ROOT
from fastjepa.config import Config, ModelConfig
from fastjepa.objectives.ijepa import costs
from fastjepa.plan.__main__ import main
from fastjepa.plan.datasheets import DEVICES
from fastjepa.plan.planner import Cluster, plan_stage, recommend
from fastjepa.plan.tables import write_tables

HUGE = Config(model=ModelConfig(name="vit_huge", patch_size=14))


def test_the_command_of_the_documentation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "plan.json"
    arguments = ["--model", "vit_huge", "--patch_size", "14", "--gpus", "64", "--memory", "80", "--json", str(report)]
    assert main(arguments) == 0
    printed, written = capsys.readouterr().out, json.loads(report.read_text())
    assert written["command"] in printed
    assert "micro_batch_size=32" in written["command"]
    assert "--config RUN.yaml model.name=vit_huge" in written["command"]  # without, the default run would start
    assert [plan["stage"] for plan in written["plans"]] == list(costs.STAGES)
    assert all(assumption in printed for assumption in written["assumptions"])


def test_what_does_not_fit_says_what_would(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", "vit_giant", "--gpus", "1", "--memory", "24"]) == 2
    message = capsys.readouterr().err
    assert "does not fit 1 GPU with 24 GiB" in message
    assert "2 GPUs" in message
    assert "GPUs with 40 GiB" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "3"], "global_batch_size = 2048: expected a multiple of --gpus 3"),
        (["--gpus", "0"], "--gpus 0: expected a positive number"),
        (["--utilisation", "1.5"], "--utilisation 1.5: expected a share"),
        (["--patch_size", "15"], "multiples of model.patch_size = 15"),
        (["model.nam=vit_huge"], "unknown key model.nam"),
    ],
)
def test_mistakes_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_a_run_is_planned_by_its_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    config = str(ROOT / "configs" / "in1k_vith14_ep300.yaml")
    assert main(["--config", config, "--gpus", "16", "--device", "a100"]) == 0
    printed = capsys.readouterr().out
    assert f"--config {config}" in printed
    assert "masks.mode official" in printed


def test_throughput_is_never_above_the_peak() -> None:
    mean, _ = costs.sample_tokens(HUGE.masks, HUGE.grid_h, HUGE.grid_w)
    for device in DEVICES.values():
        for gpus in (1, 8, 1024):
            cluster = Cluster(device=device, gpus=gpus)
            for stage in costs.STAGES:
                plan = plan_stage(HUGE, cluster, stage)
                bound = gpus * device.flops * cluster.utilisation / costs.flops_per_image(HUGE, mean)
                assert 0 < plan.images_per_second <= bound


def test_more_memory_never_means_a_smaller_micro_batch() -> None:
    cluster = [Cluster(device=DEVICES["h100"], gpus=8, memory=memory) for memory in (24, 40, 80, 141)]
    for checkpointing in (False, True):
        model = replace(HUGE.model, activation_checkpointing=checkpointing)
        micro = [plan_stage(replace(HUGE, model=model), c, 2).micro for c in cluster]
        assert micro == sorted(micro)
        assert micro[-1] > 0


@pytest.mark.parametrize(("gpus", "stage"), [(1, "torch"), (2, 1), (8, 1), (64, 1), (1024, 1)])
@pytest.mark.parametrize("model", ["vit_small", "vit_giant"])
def test_one_gpu_needs_no_deepspeed_and_several_are_best_with_zero_1(model: Any, gpus: int, stage: costs.Stage) -> None:
    """As README and docs/plan.md say it."""
    config, cluster = Config(model=ModelConfig(name=model)), Cluster(device=DEVICES["h100"], gpus=gpus)
    chosen = recommend([plan_stage(config, cluster, stage) for stage in costs.STAGES])
    assert chosen is not None
    assert chosen[0].stage == stage


def test_who_reads_no_further_is_not_bothered() -> None:
    """`| head`."""
    command = [sys.executable, "-m", "fastjepa.plan", "--model", "vit_small"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""


def test_the_tables_of_the_documentation_are_up_to_date(tmp_path: Path) -> None:
    """If this fails: python -m fastjepa.plan --table docs/plan.md."""
    documentation = (ROOT / "docs" / "plan.md").read_text(encoding="utf-8")
    copy = tmp_path / "plan.md"
    copy.write_text(documentation, encoding="utf-8")
    write_tables(copy)
    assert copy.read_text(encoding="utf-8") == documentation


def test_a_file_without_places_for_the_tables_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other.md").write_text("# Other\n")
    assert main(["--table", str(tmp_path / "other.md")]) == 2
    assert "<!-- table a100 -->" in capsys.readouterr().err
