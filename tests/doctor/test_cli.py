"""fastjepa doctor and the other commands, as a user starts them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import fastjepa.__main__ as command_line
from benchmarks.launch import ROOT
from fastjepa.doctor import __main__ as doctor
from fastjepa.doctor import examine
from fastjepa.doctor.probes import Outcome
from tests.support.tiny_run import write_recipe

WORKS: dict[str, dict[str, Any]] = {
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
        "reckoned_images_per_second": 500.0,
        "rates": {"64": {"images_per_second": 480.0, "cpu_seconds": 0.0001, "mfu": 0.5, "peak_bytes": 2**29}},
    },
    "link": {"bytes_per_second": 1e9, "latency": 1e-4},
}


@pytest.fixture
def probed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Outcome]:
    """What the probes say, to be changed; they are not run. The run folder would lie in tmp_path."""
    outcomes = {name: Outcome(result) for name, result in WORKS.items()}

    class Said:
        def __init__(self, name: str) -> None:
            self._name = name

        def __enter__(self) -> Said:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def outcome(self) -> Outcome:
            return outcomes[self._name]

    monkeypatch.setattr(doctor, "Running", Said)
    monkeypatch.setattr(examine, "outcome_of", lambda name, *_: outcomes[name])
    monkeypatch.chdir(tmp_path)
    return outcomes


def change(outcomes: dict[str, Outcome], name: str, **changes: Any) -> None:
    outcomes[name] = Outcome({**outcomes[name].result, **changes})


def test_a_run_that_starts_is_no_problem(probed: dict[str, Outcome], capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main([]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "limited by the loader: it delivers 310 images/s with data.num_threads = 1, the step takes 480" in printed
    assert "python fastjepa/train.py" in printed
    assert "no problems" in printed
    assert probed


@pytest.mark.parametrize(
    ("name", "changes", "arguments", "message"),
    [
        ("loader", {"problem": "data.source = /x: No such file", "images": 0, "rates": {}}, [], "No such file"),
        ("loader", {"images": 50}, [], "global_batch_size = 64: the data set has 50 images"),
        ("kernels", {"operations": [{"operation": "a", "head_dim": 0, "problem": "it"}]}, [], "ask for one that is"),
        ("dali", {}, ["data.loader=dali"], "data.loader=turbo decodes on the CPU"),
        ("pytorch", {"import_problem": "ModuleNotFoundError: No module named 'yaml'"}, [], "cannot be imported"),
        ("pytorch", {}, ["--ranks", "3"], "64 cannot be shared out over 3 ranks"),
        ("pytorch", {}, ["micro_batch_size=48"], "no multiple of 48"),
        ("pytorch", {}, ["output_dir=/proc/run"], "PROBLEM output_dir /proc"),
    ],
)
def test_what_would_stop_a_run_is_a_problem(
    probed: dict[str, Outcome],
    capsys: pytest.CaptureFixture[str],
    name: str,
    changes: dict[str, Any],
    arguments: list[str],
    message: str,
) -> None:
    change(probed, name, **changes)
    assert doctor.main(arguments) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert message in printed
    assert "PROBLEM" in printed


def test_a_model_that_does_not_fit(probed: dict[str, Outcome], capsys: pytest.CaptureFixture[str]) -> None:
    change(probed, "pytorch", gpus=[{"name": "GPU", "capability": [8, 0], "memory": 12 * 2**30, "free": 12 * 2**30}])
    huge = [
        "model.name=vit_base",
        "model.embed_dim=768",
        "model.depth=12",
        "data.image_size=224",
        "model.patch_size=14",
    ]
    assert doctor.main([*huge, "global_batch_size=512"]) == 1
    printed = capsys.readouterr().out
    assert "limited by memory: a micro batch of 512 images needs" in printed
    assert "micro_batch_size: " in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data.nun_threads=3"], "unknown key data.nun_threads; did you mean data.num_threads?"),
        (["--config", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
        (["--ds_config", "nowhere.json"], "nowhere.json: cannot read this DeepSpeed configuration"),
        (["--json", "/proc/nowhere/report.json"], "--json /proc/nowhere/report.json: cannot be written"),
    ],
)
def test_mistakes_are_told_as_training_tells_them(
    probed: dict[str, Outcome], capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert doctor.main(arguments) == 2
    assert message in capsys.readouterr().err
    assert probed


def test_under_a_launcher_one_rank_looks(probed: dict[str, Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    probed.clear()  # looking at anything would be an error
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert doctor.main([]) == 0


def started(*arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    command = [sys.executable, "-m", "fastjepa", *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=600, check=False)


def test_a_run_is_examined_and_its_folder_left_alone(tmp_path: Path) -> None:
    """Everything is really measured, on a tiny run whose folder holds something already."""
    config, run = write_recipe(tmp_path), tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "metrics.jsonl").write_text("{}\n")
    before = {path: path.stat().st_mtime_ns for path in [tmp_path, *tmp_path.rglob("*")]}
    report_file = tmp_path.parent / "report.json"
    process = started("doctor", "--config", config, f"output_dir={run}", "--json", str(report_file))
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


@pytest.mark.parametrize(
    ("command", "usage"), [("train", "train.py"), ("plan", "plan"), ("check", "check"), ("doctor", "doctor")]
)
def test_a_command_has_the_help_of_its_own(command: str, usage: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        command_line.main([command, "--help"])
    assert end.value.code == 0
    assert command in capsys.readouterr().out.partition("\n")[0]


def test_commands_that_are_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["trian"]) == 2
    assert "unknown command trian: expected one of train, doctor, plan, check, evaluate" in capsys.readouterr().err
    assert command_line.main([]) == 2
    assert "usage: fastjepa COMMAND" in capsys.readouterr().err
    assert command_line.main(["--help"]) == 0
    assert "usage: fastjepa COMMAND" in capsys.readouterr().out


def test_what_a_launcher_puts_before_the_command_goes_on_to_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["--local_rank=0", "train", "--print_config", "seed=7"]) == 0
    assert "seed: 7" in capsys.readouterr().out


def test_every_command_is_there() -> None:
    script = (ROOT / "setup.py").read_text()
    assert '"fastjepa=fastjepa.__main__:main"' in script
    for module, _ in command_line.COMMANDS.values():
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file()


@pytest.mark.gpu
def test_a_run_on_a_gpu_is_examined_there(tmp_path: Path) -> None:
    report_file = tmp_path / "report.json"
    process = started("doctor", f"output_dir={tmp_path / 'run'}", "--ranks", "1", "--json", str(report_file))
    assert process.returncode == 0, process.stdout + process.stderr
    report = json.loads(report_file.read_text())
    names = {finding["name"] for finding in report["installation"]}
    assert {"GPU 0", "GPU driver"} <= names
    assert report["facts"]["kernels"]["agreement"] < 1e-2
    assert report["facts"]["step"]["rates"]["64"]["images_per_second"] > 0
