"""The command python -m fastjepa.plan."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.launch import ROOT
from fastjepa.plan.__main__ import main
from fastjepa.plan.zero import STAGES


def test_the_command_of_the_documentation_prints_and_writes_a_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "plan.json"
    arguments = ["--model", "vit_huge", "--patch_size", "14", "--gpus", "64", "--memory", "80", "--json", str(report)]
    assert main(arguments) == 0
    printed, written = capsys.readouterr().out, json.loads(report.read_text())
    assert written["command"] in printed
    assert "micro_batch_size=32" in written["command"]
    assert "--config RUN.yaml model.name=vit_huge" in written["command"]  # without --config the default run would start
    assert [plan["stage"] for plan in written["plans"]] == list(STAGES)
    assert all(assumption in printed for assumption in written["assumptions"])


def test_a_model_that_does_not_fit_is_refused_with_what_would(capsys: pytest.CaptureFixture[str]) -> None:
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
        (["objective.name=nonsense"], "objective.name = nonsense: expected one of: ijepa"),
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
    assert "context encoder 630 M, predictor 22 M, target encoder 630 M parameters; objective ijepa" in printed


def test_masks_of_the_configuration_decide_about_the_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    printed = []
    for mode in ("official", "budget"):
        assert main(["--model", "vit_small", f"objective.masks.mode={mode}"]) == 0
        (line,) = (line for line in capsys.readouterr().out.splitlines() if "tokens per image" in line)
        printed.append(line)
    assert printed[0] != printed[1]
    assert "context 49, " in printed[1]  # a quarter of 196 patches


@pytest.mark.processes
def test_a_reader_that_closes_the_pipe_early_sees_no_error() -> None:
    """As `| head` does."""
    command = [sys.executable, "-m", "fastjepa.plan", "--model", "vit_small"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""


def test_a_file_without_places_for_the_tables_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other.md").write_text("# Other\n")
    assert main(["--table", str(tmp_path / "other.md")]) == 2
    assert "<!-- table a100 -->" in capsys.readouterr().err
