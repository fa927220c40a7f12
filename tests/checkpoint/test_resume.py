"""The choice of the checkpoint from which a run goes on, and the settings that have changed since it was written."""

from __future__ import annotations

import dataclasses
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastjepa.checkpoint import writer
from fastjepa.checkpoint.format import RunState, latest
from fastjepa.checkpoint.resume import HARMLESS, checkpoints_to_resume, differences, resume
from fastjepa.config import Config, ModelConfig
from fastjepa.engine.base import Engine
from fastjepa.errors import CheckpointError
from fastjepa.objectives.ijepa.block_sizes import MaskConfig
from fastjepa.objectives.ijepa.settings import Savings
from fastjepa.run.folder import RunFolder
from tests.support.checkpoints import CONFIG, assert_identical, state_of, torch_engine

IMAGES = {"images": 7, "fingerprint": "abc"}
TOTAL = 10
"""Steps of the run."""


def recorded(config: Config) -> dict[str, Any]:
    """The settings as an index.json has them: resolved, tuples as lists."""
    record: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config.resolved())))
    return record


def fake_checkpoint(folder: RunFolder, step: int) -> Path:
    """Make an empty checkpoint, which is the newest of its run."""
    path = folder.checkpoints / f"step_{step:08d}"
    path.mkdir(parents=True)
    (folder.checkpoints / "latest").write_text(path.name)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


# Differences of settings


def test_the_same_settings_have_no_differences() -> None:
    assert differences(recorded(CONFIG), CONFIG) == []


def test_a_changed_setting_is_named_with_both_values_and_tuples_as_lists() -> None:
    now = replace(
        CONFIG,
        seed=5,
        data=replace(CONFIG.data, crop_aspect=(0.5, 2.0)),
        optim=replace(CONFIG.optim, weight_decay=0.1),
        objective=replace(CONFIG.objective, masks=MaskConfig(min_keep=3)),  # type: ignore[call-arg]
    )
    assert differences(recorded(CONFIG), now) == [
        "seed was 0, is 5",
        "data.crop_aspect was [0.75, 1.3333333333333333], is [0.5, 2.0]",
        "objective.masks.min_keep was 2, is 3",
        "optim.weight_decay was 0.04, is 0.1",
    ]


def test_settings_that_cannot_change_what_is_learnt_are_not_named() -> None:
    now = replace(
        CONFIG,
        resume="never",
        output_dir="elsewhere",
        keep_every=7,
        compile="blocks",
        data=replace(CONFIG.data, num_threads=9, val_source="elsewhere"),
        model=replace(CONFIG.model, activation_checkpointing=True),
        kernels=replace(CONFIG.kernels, linear="torch"),
        objective=replace(CONFIG.objective, savings=Savings(target_last_block=False)),  # type: ignore[call-arg]
    )
    assert differences(recorded(CONFIG), now) == []


def test_every_harmless_setting_is_one_of_the_configuration() -> None:
    record = recorded(CONFIG)
    for name in HARMLESS:
        holder: Any = record
        for key in name.split("."):
            assert key in holder, name
            holder = holder[key]


def test_a_named_model_and_its_sizes_written_out_are_the_same() -> None:
    named = Config(model=ModelConfig(name="vit_tiny"), objective=CONFIG.objective)
    written_out = replace(
        named, model=ModelConfig(name="vit_tiny", embed_dim=192, depth=12, num_heads=3, mlp_ratio=4.0)
    )
    assert differences(recorded(named), written_out) == []
    assert differences(dataclasses.asdict(named), written_out) == []  # as earlier versions recorded it, with nulls


def test_a_record_of_an_earlier_version_is_compared_by_the_names_of_today() -> None:
    old = recorded(CONFIG)
    objective = old.pop("objective")
    old["masks"] = objective["masks"] | {"min_keep": 3}
    for key in ("predictor_embed_dim", "predictor_depth"):
        old["model"][key] = objective[key]
    assert differences(old, CONFIG) == ["objective.masks.min_keep was 3, is 2"]


def test_a_record_with_settings_that_are_unknown_is_compared_as_far_as_it_goes() -> None:
    old = recorded(CONFIG) | {"setting_of_another_version": 1}
    old["optim"]["lr"] = 0.5
    assert differences(old, CONFIG) == ["optim.lr was 0.5, is 0.003"]


# The checkpoints to try


def test_a_new_run_has_no_checkpoint_to_resume(folder: RunFolder) -> None:
    assert checkpoints_to_resume("auto", folder) == []
    assert checkpoints_to_resume("never", folder) == []


def test_a_run_resumes_from_its_newest_checkpoint_or_else_from_an_earlier_one(folder: RunFolder) -> None:
    earlier, newest = fake_checkpoint(folder, 4), fake_checkpoint(folder, 8)
    assert checkpoints_to_resume("auto", folder) == [newest, earlier]


def test_resume_never_refuses_a_folder_that_holds_a_checkpoint(folder: RunFolder) -> None:
    fake_checkpoint(folder, 4)
    message = f"{folder.path} already holds step_00000004: choose another output_dir, or resume=auto"
    with pytest.raises(CheckpointError) as caught:
        checkpoints_to_resume("never", folder)
    assert str(caught.value) == message


def test_a_new_run_starts_from_the_checkpoint_that_resume_names(folder: RunFolder, tmp_path: Path) -> None:
    other = RunFolder(tmp_path / "other")
    earlier, newest = fake_checkpoint(other, 4), fake_checkpoint(other, 8)
    assert checkpoints_to_resume(str(earlier), folder) == [earlier]
    assert checkpoints_to_resume(str(other.path), folder) == [newest]
    assert checkpoints_to_resume(str(other.checkpoints), folder) == [newest]
    absent = tmp_path / "absent"
    assert checkpoints_to_resume(str(absent), folder) == [absent]  # loading it says what is wrong


def test_a_run_that_has_begun_resumes_from_its_own_checkpoints_whatever_resume_names(
    folder: RunFolder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A job that is queued again with the same command line must not start over."""
    other = fake_checkpoint(RunFolder(tmp_path / "other"), 4)
    own = fake_checkpoint(folder, 8)
    assert checkpoints_to_resume(str(other), folder) == [own]
    assert caplog.messages == [f"going on from {own}: the run has begun, so --resume {other} is not read again"]


def test_an_earlier_checkpoint_of_the_same_run_can_be_named(
    folder: RunFolder, caplog: pytest.LogCaptureFixture
) -> None:
    earlier = fake_checkpoint(folder, 4)
    fake_checkpoint(folder, 8)
    assert checkpoints_to_resume(str(earlier), folder) == [earlier]
    assert not caplog.messages


# Loading


@pytest.fixture
def begun(folder: RunFolder) -> tuple[RunFolder, Engine]:
    """A run with checkpoints of steps 2 and 4 with different weights, and the engine that wrote them."""
    engine = torch_engine(seed=1)
    for step in (2, 4):
        for piece in engine.pieces():
            piece.view(piece.tensor).fill_(step)
        writer.save(folder.checkpoints, engine, RunState(step, recorded(CONFIG), IMAGES))
    return folder, engine


def damage(checkpoint: Path) -> None:
    (checkpoint / "index.json").unlink()


def test_a_run_without_checkpoints_starts_at_step_0_with_its_own_weights(folder: RunFolder) -> None:
    engine = torch_engine()
    before = state_of(engine)
    assert resume(CONFIG, folder, engine, IMAGES, TOTAL) == 0
    assert_identical(state_of(engine), before)


def test_the_newest_checkpoint_is_loaded_without_a_warning(
    begun: tuple[RunFolder, Engine], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fastjepa")
    folder, written_by = begun
    engine = torch_engine()
    assert resume(CONFIG, folder, engine, IMAGES, TOTAL) == 4
    assert_identical(state_of(engine), state_of(written_by))
    assert [record.getMessage() for record in caplog.records if record.name == "fastjepa.checkpoint.resume"] == [
        f"resuming from {latest(folder.checkpoints)}"
    ]


def test_a_damaged_checkpoint_is_logged_and_the_one_before_it_is_loaded(
    begun: tuple[RunFolder, Engine], caplog: pytest.LogCaptureFixture
) -> None:
    folder, _ = begun
    newest = folder.checkpoints / "step_00000004"
    damage(newest)
    engine = torch_engine()
    assert resume(CONFIG, folder, engine, IMAGES, TOTAL) == 2
    assert f"{newest} is not a complete checkpoint: index.json is missing: looking for the checkpoint before it" in (
        caplog.messages
    )
    assert all(bool((weight == 2).all()) for weight in state_of(engine)["weight"].values())


def test_a_run_whose_checkpoints_are_all_damaged_is_an_error_that_names_each(begun: tuple[RunFolder, Engine]) -> None:
    folder, _ = begun
    for checkpoint in folder.checkpoints.glob("step_*"):
        damage(checkpoint)
    with pytest.raises(CheckpointError, match=r"no checkpoint can be loaded: .*step_00000004.*; .*step_00000002"):
        resume(CONFIG, folder, torch_engine(), IMAGES, TOTAL)


def test_other_settings_and_other_images_are_logged(
    begun: tuple[RunFolder, Engine], caplog: pytest.LogCaptureFixture
) -> None:
    folder, engine = begun
    now = replace(CONFIG, optim=replace(CONFIG.optim, lr=0.5), data=replace(CONFIG.data, flip=0.25))
    assert resume(now, folder, engine, {"images": 6, "fingerprint": "xyz"}, TOTAL) == 4
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        "resuming with another setting: data.flip was 0.0, is 0.25",
        "resuming with another setting: optim.lr was 0.003, is 0.5",
        "resuming on other data: the checkpoint saw 7 images, now there are 6 of other names",
    ]


def test_a_complete_run_of_other_settings_is_refused(begun: tuple[RunFolder, Engine]) -> None:
    """No step is left to train, and the weights that are there were not trained with these settings."""
    folder, engine = begun
    now = replace(CONFIG, seed=5)
    with pytest.raises(CheckpointError) as caught:
        resume(now, folder, engine, IMAGES, total=4)
    assert str(caught.value) == (
        f"{folder.path} holds a complete run of other settings: seed was 0, is 5. Choose another output_dir"
    )
    assert resume(CONFIG, folder, engine, IMAGES, total=4) == 4
