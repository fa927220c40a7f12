"""A run that fastjepa 0.1.0 wrote before settings and metadata changed, in written_by_0.1.0: it is read and goes on."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastjepa.checkpoint.format import read_index
from fastjepa.evaluate import load_encoder
from fastjepa.objectives.registry import load_config
from fastjepa.train import main

OLD = Path(__file__).parent / "written_by_0.1.0"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The run as it was stopped after step 2 of 4."""
    return Path(shutil.copytree(OLD, tmp_path / "run"))


def test_it_goes_on_to_the_weights_that_the_version_itself_reached(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Equal bit for bit on the CPU that made the file; on others, products of matrices round otherwise."""
    with caplog.at_level(logging.WARNING):
        assert main(["--config", str(run / "config.yaml"), f"output_dir={run}"]) == 0
    assert "masks is now objective.masks" in caplog.text
    assert "resuming with another setting" not in caplog.text
    mine = load_file(run / "checkpoints" / "step_00000004" / "model.safetensors")
    theirs = load_file(OLD / "step_00000004.safetensors")
    assert mine.keys() >= theirs.keys()
    for name, weight in theirs.items():
        torch.testing.assert_close(mine[name], weight, rtol=1e-4, atol=1e-6, msg=name)


def test_its_encoder_is_read_though_the_file_has_no_position_tables(run: Path) -> None:
    encoder = load_encoder(run)
    weights = load_file(run / "checkpoints" / "step_00000002" / "model.safetensors")
    state = encoder.state_dict()
    for name in state.keys() - {"pos_embed"}:
        assert torch.equal(state[name], weights[f"target_encoder.{name}"])
    assert state["pos_embed"].abs().sum() > 0


def test_its_settings_are_read_under_the_names_of_today(run: Path) -> None:
    config = load_config(run / "config.yaml")
    old = read_index(run / "checkpoints" / "step_00000002")["config"]
    assert old["masks"]["min_keep"] == config.objective.masks.min_keep  # type: ignore[attr-defined]
    assert old["model"]["predictor_embed_dim"] == config.objective.predictor_embed_dim == 8  # type: ignore[attr-defined]
