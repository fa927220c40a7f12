"""fastjepa/train.py --profile: a profiled run learns the same, and leaves its report behind."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from fastjepa.profiling import DEFAULT_STEPS
from fastjepa.train import main
from tests.support.tiny_run import metrics, write_recipe
from tests.test_train import LEARNT, TRAIN, output_of

FILES = {"report.html", "report.json", "report.csv", "operators.csv", "trace.json"}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A configuration whose run is one step longer than the profile."""
    return write_recipe(tmp_path_factory.mktemp("recipe"), f"epochs: {(DEFAULT_STEPS.total + 1) / 8}")


@pytest.fixture(scope="module")
def plain(recipe: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("plain")
    assert main(["--config", recipe, f"output_dir={run}"]) == 0
    return run


def test_a_profiled_run_learns_the_same_to_the_bit(recipe: str, plain: Path, tmp_path: Path) -> None:
    assert main(["--profile", "--config", recipe, f"output_dir={tmp_path}"]) == 0
    assert metrics(tmp_path, *LEARNT) == metrics(plain, *LEARNT)
    last = f"checkpoints/step_{DEFAULT_STEPS.total + 1:08d}/rank_00000.safetensors"
    assert (tmp_path / last).read_bytes() == (plain / last).read_bytes()
    assert {path.name for path in (tmp_path / "profile").iterdir()} == FILES
    (measured,) = json.loads((tmp_path / "profile" / "report.json").read_text())["measurements"]
    assert len(measured["steps_ms"]) == DEFAULT_STEPS.timed
    assert measured["images_per_second"] > 0
    assert not (plain / "profile").exists()


@pytest.mark.processes
@pytest.mark.parametrize("ds_config", [[], ["--ds_config", "configs/zero2.json"]])
def test_a_profile_covers_both_ranks_and_each_writes_a_trace(ds_config: list[str], recipe: str, tmp_path: Path) -> None:
    command = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", TRAIN, *ds_config]
    output_of(sys.executable, "-m", *command, "--profile", "--config", recipe, f"output_dir={tmp_path}")
    assert {path.name for path in (tmp_path / "profile").iterdir()} == {*FILES, "trace_rank1.json"}
    (measured,) = json.loads((tmp_path / "profile" / "report.json").read_text())["measurements"]
    assert measured["ranks"] == 2
    assert measured["micro_batch_size"] == 4
    times = measured["step_ms"]
    assert 8e3 / times["p80"] <= measured["images_per_second"] <= 8e3 / times["p20"]  # of both ranks
    assert "communication" in {part["name"] for part in measured["split"]["beside"]}
    waits = {part["name"] for part in measured["split"]["parts"]}
    assert "waiting for gradients" in waits or ds_config


def test_a_run_that_is_too_short_to_profile_is_refused(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--profile", "--config", recipe, "epochs=1", f"output_dir={tmp_path}"]) == 2
    assert (
        f"--profile: expected {DEFAULT_STEPS.total} steps or more, but the run has only 8 left"
        in capsys.readouterr().err
    )
