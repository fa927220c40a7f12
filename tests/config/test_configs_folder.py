"""The files of configs/: a published run has the figures that it claims, a DeepSpeed file the stage in its name.

Other runs, such as your own, may lie there too: tests load them and hold them to no figures.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from benchmarks.launch import ROOT
from fastjepa.config import Config
from fastjepa.config.file import dump_config
from fastjepa.objectives.ijepa.settings import IJEPAConfig
from fastjepa.objectives.registry import load_config

CONFIGS = ROOT / "configs"


class Run(NamedTuple):
    """What distinguishes a published run: its line in the table of official runs and in the table of models."""

    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float
    predictor_depth: int
    patch_size: int
    image_size: int
    num_patches: int
    epochs: float
    start_lr: float
    warmup_epochs: float
    schedule_scale: float
    micro_batch_size: int


RUNS = {
    "in1k_vith14_ep300": Run(1280, 32, 16, 4, 12, 14, 224, 256, 300, 2e-4, 40, 1.0, 128),
    "in1k_vith16_448_ep300": Run(1280, 32, 16, 4, 12, 16, 448, 784, 300, 2e-4, 40, 1.0, 16),
    "in22k_vith14_ep66": Run(1280, 32, 16, 4, 12, 14, 224, 256, 66, 2e-4, 3, 1.0, 32),
    "in22k_vitg16_ep44": Run(1408, 40, 16, 48 / 11, 16, 16, 224, 196, 44, 2e-4, 3, 1.0, 16),
    "in1k_vitb16_ep600": Run(768, 12, 12, 4, 6, 16, 224, 196, 600, 1e-4, 15, 1.25, 128),
    "in1k_vitl16_ep600": Run(1024, 24, 16, 4, 12, 16, 224, 196, 600, 1e-4, 15, 1.25, 128),
}


def load(name: str) -> Config:
    """A shipped run by its name."""
    return load_config(CONFIGS / f"{name}.yaml")


def test_the_published_files_are_there() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} >= {*RUNS, "default", "debug"}
    assert {path.name for path in CONFIGS.glob("*.json")} >= {f"zero{stage}.json" for stage in range(4)}


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.stem)
def test_a_run_is_read_without_old_names_and_its_record_as_the_same_settings(
    path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = load_config(path)
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "config.yaml") == config.resolved()
    assert not caplog.messages


@pytest.mark.parametrize("name", [*RUNS, "default", "debug"])
def test_a_published_run_writes_to_the_folder_of_its_name(name: str) -> None:
    assert load(name).output_dir == f"runs/{name}"


@pytest.mark.parametrize("name", RUNS)
def test_a_published_run_has_the_published_figures(name: str) -> None:
    config = load(name)
    model, data, objective, optim = config.model, config.data, IJEPAConfig.of(config), config.optim
    masks = objective.masks
    assert config.micro_batch_size is not None
    assert RUNS[name] == Run(
        *model.size,
        predictor_depth=objective.depth_of_predictor(model.name),
        patch_size=model.patch_size,
        image_size=data.image_hw[0],
        num_patches=config.num_patches,
        epochs=config.epochs,
        start_lr=optim.start_lr,
        warmup_epochs=optim.warmup_epochs,
        schedule_scale=optim.schedule_scale,
        micro_batch_size=config.micro_batch_size,
    )
    assert (config.global_batch_size, objective.predictor_embed_dim, model.init) == (2048, 384, "official")
    assert data.image_hw[0] == data.image_hw[1]
    assert (data.in_channels, data.crop_scale, data.crop_aspect) == (3, (0.3, 1.0), (3 / 4, 4 / 3))
    assert (data.mean, data.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert (masks.mode, masks.strategy, masks.num_target_blocks, masks.min_keep) == ("official", "multiblock", 4, 10)
    assert (masks.context_scale, masks.target_scale) == ((0.85, 1.0), (0.15, 0.2))
    assert masks.target_aspect_ratio == (0.75, 1.5)
    assert (optim.lr, optim.final_lr, optim.betas, optim.eps) == (1e-3, 1e-6, (0.9, 0.999), 1e-8)
    assert (optim.weight_decay, optim.final_weight_decay) == (0.04, 0.4)
    assert optim.ema_momentum == (0.996, 1.0)
    assert optim.clip_grad is None
    assert (objective.loss, objective.normalize_targets) == ("smooth_l1", True)


@pytest.mark.parametrize("name", RUNS)
def test_a_published_run_runs_in_any_mask_mode(name: str) -> None:
    """The comment in the file says that objective.masks.mode may be changed: the grid must allow it."""
    for mode in ("ragged", "budget"):
        config = load_config(CONFIGS / f"{name}.yaml", [f"objective.masks.mode={mode}"])
        assert IJEPAConfig.of(config).masks.mode == mode


def test_the_default_run_is_the_recipe_that_was_shown_to_learn() -> None:
    config = load("default")
    model, data, objective, optim = config.model, config.data, IJEPAConfig.of(config), config.optim
    masks = objective.masks
    assert (*model.size, objective.depth_of_predictor(model.name)) == (64, 4, 4, 4, 2)
    assert (objective.predictor_embed_dim, model.patch_size, model.init) == (48, 7, "fan_in")
    assert (data.source, data.image_hw, data.in_channels, data.crop_scale) == ("fashion_mnist", (28, 28), 1, (0.5, 1.0))
    assert (data.mean, data.std) == ((0.286,), (0.353,))
    assert (config.grid_h, config.grid_w) == (4, 4)
    assert (masks.mode, masks.num_target_blocks, masks.min_keep) == ("budget", 4, 5)
    steps_per_epoch = 8000 // config.global_batch_size
    assert (config.global_batch_size, config.epochs * steps_per_epoch) == (64, 2500)
    assert optim.warmup_epochs * steps_per_epoch == 250
    assert (optim.start_lr, optim.lr, optim.final_lr) == (2e-4, 2e-3, 1e-6)
    assert (optim.weight_decay, optim.final_weight_decay) == (0.04, 0.4)
    assert (optim.ema_momentum, optim.schedule_scale) == ((0.994, 1.0), 1.25)


def test_the_debug_run_is_twenty_steps_of_the_default_data() -> None:
    debug, default = load("debug"), load("default")
    assert debug.epochs * (8000 // debug.global_batch_size) == 20
    assert (debug.data.source, debug.data.image_size) == (default.data.source, default.data.image_size)
    assert (debug.data.mean, debug.data.std) == (default.data.mean, default.data.std)
    assert debug.model.size.embed_dim < default.model.size.embed_dim


@pytest.mark.parametrize("stage", range(4))
def test_deepspeed_accepts_every_key(stage: int) -> None:
    """DeepSpeed ignores a misspelt top-level key silently, so the test looks up each key in what it made of the file."""
    from deepspeed.runtime.config import DeepSpeedConfig

    settings: dict[str, Any] = json.loads((CONFIGS / f"zero{stage}.json").read_text())
    ours: dict[str, Any] = {"train_batch_size": 24, "train_micro_batch_size_per_gpu": 4}
    ours |= {"gradient_accumulation_steps": 6, "gradient_clipping": 0.5}
    assert {key for key, value in settings.items() if value == "auto"} == set(ours)
    assert settings["bf16"].pop("enabled") == "auto"

    parsed = DeepSpeedConfig({**settings, **ours, "bf16": {**settings["bf16"], "enabled": stage > 0}})

    assert set(settings) == {*ours, "bf16", "zero_optimization", "zero_allow_untested_optimizer", "steps_per_print"}
    assert (parsed.train_batch_size, parsed.train_micro_batch_size_per_gpu) == (24, 4)
    assert (parsed.gradient_accumulation_steps, parsed.gradient_clipping) == (6, 0.5)
    assert parsed.bfloat16_config.enabled == (stage > 0)
    # DeepSpeed's check would wait for the device in every step. Weights that are not finite are found before they are saved.
    assert parsed.bfloat16_config.check_grad_overflow == (stage == 0)
    assert parsed.zero_allow_untested_optimizer is True
    assert parsed.steps_per_print is None  # it prints nothing of its own
    zero = parsed.zero_config
    assert zero.stage == stage
    by_file_name = zero.model_dump() | zero.model_dump(by_alias=True)
    for key, value in settings["zero_optimization"].items():
        assert by_file_name[key] == value, key
    if stage == 3:
        assert zero.sub_group_size >= 10**12  # one sub-group per parameter group: the EMA pairs them
