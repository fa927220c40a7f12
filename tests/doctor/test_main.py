"""fastjepa doctor as a user starts it: exit status, mistakes, launchers, and a real examination."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.launch import ROOT
from fastjepa.doctor import __main__ as doctor
from fastjepa.doctor.probe_process import Outcome
from tests.support.tiny_run import write_recipe


@pytest.mark.usefixtures("fake_probes")
def test_a_healthy_run_ends_with_status_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main([]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "limited by the loader: it delivers 310 images/s with data.num_threads = 1, the step trains 480" in printed
    assert "python fastjepa/train.py" in printed
    assert "no problems" in printed


@pytest.mark.usefixtures("fake_probes")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data.nun_threads=3"], "unknown key data.nun_threads; did you mean data.num_threads?"),
        (["--config", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
        (["--ds_config", "nowhere.json"], "nowhere.json: cannot read this DeepSpeed configuration"),
        (["--json", "/proc/nowhere/report.json"], "--json /proc/nowhere/report.json: cannot be written"),
    ],
)
def test_a_mistake_of_the_user_ends_with_status_2_and_its_message(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert doctor.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_ranks_must_be_at_least_1(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        doctor.main(["--ranks", "0"])
    assert end.value.code == 2
    assert "--ranks 0: expected 1 or more" in capsys.readouterr().err


def test_under_a_launcher_other_ranks_than_the_first_do_nothing(
    fake_probes: dict[str, Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_probes.clear()  # any probe would now be an error
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert doctor.main([]) == 0


def test_under_a_launcher_the_first_rank_examines_a_run_of_all_ranks(
    fake_probes: dict[str, Outcome], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert doctor.main([]) == 0
    assert "torchrun --nproc_per_node 2" in capsys.readouterr().out
    assert fake_probes
    assert not {"RANK", "WORLD_SIZE"} & set(os.environ)  # the probes are alone


def test_a_broken_installation_is_reported_before_anything_is_measured(
    fake_probes: dict[str, Outcome], capsys: pytest.CaptureFixture[str]
) -> None:
    fake_probes["pytorch"] = Outcome({}, "ended with status 1: ImportError: libcudart.so.13")
    for name in ("kernels", "loader", "step", "link"):
        del fake_probes[name]
    assert doctor.main([]) == 1
    printed = capsys.readouterr().out
    assert "the check of it ended with status 1: ImportError: libcudart.so.13" in printed
    assert "repair the installation first" in printed


def start(*arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    command = [sys.executable, "-m", "fastjepa", *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=600, check=False)


@pytest.mark.processes
def test_a_real_run_is_examined_and_its_folder_left_alone(tmp_path: Path) -> None:
    """No probe is replaced. The run is tiny, and its folder holds something already."""
    config, run = write_recipe(tmp_path), tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "metrics.jsonl").write_text("{}\n")
    before = {path: path.stat().st_mtime_ns for path in [tmp_path, *tmp_path.rglob("*")]}
    report_file = tmp_path.parent / "report.json"
    process = start("doctor", "--config", config, f"output_dir={run}", "--json", str(report_file))
    assert process.returncode == 0, process.stdout + process.stderr
    assert {path: path.stat().st_mtime_ns for path in [tmp_path, *tmp_path.rglob("*")]} == before

    report = json.loads(report_file.read_text())
    assert report["problems"] == 0
    assert report["limit"] in ("loader", "step", "cores")
    assert report["verdict"] in " ".join(process.stdout.split())
    assert report["command"].startswith(f"python fastjepa/train.py --config {config} output_dir={run}")
    for part in ("installation", "run"):
        assert {"name", "level", "found", "advice"} == set(report[part][0])
        assert all(finding["found"].split()[0] in process.stdout for finding in report[part])
    facts = report["facts"]
    assert facts["loader"]["images"] == 70
    assert list(facts["step"]["rates"]) == ["8"]
    assert facts["step"]["rates"]["8"]["images_per_second"] > 0
    assert facts["memory_needed_bytes"] < facts["memory_bytes"]
    assert facts["host"]["cores"] > 0


@pytest.mark.processes
@pytest.mark.gpu
def test_a_run_on_a_gpu_is_examined_there(tmp_path: Path) -> None:
    report_file = tmp_path / "report.json"
    process = start("doctor", f"output_dir={tmp_path / 'run'}", "--ranks", "1", "--json", str(report_file))
    assert process.returncode == 0, process.stdout + process.stderr
    report = json.loads(report_file.read_text())
    names = {finding["name"] for finding in report["installation"]}
    assert {"GPU 0", "GPU driver"} <= names
    assert report["facts"]["kernels"]["agreement"] < 1e-2
    assert report["facts"]["step"]["rates"]["64"]["images_per_second"] > 0
