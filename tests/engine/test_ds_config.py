"""DeepSpeed's JSON is filled in from the run's settings, and refused where it contradicts them or would break the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.launch import ROOT
from fastjepa.config import Config, OptimConfig
from fastjepa.config.batch_sizes import BatchSizes
from fastjepa.engine.ds_config import REFUSED, read_ds_config
from fastjepa.errors import ConfigError
from tests.support.small import small_config

CONFIGS = ROOT / "configs"
RUN = small_config(global_batch_size=12, micro_batch_size=2, optim=OptimConfig(clip_grad=0.5))
FILLED = {
    "train_batch_size": 12,
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 3,
    "zero_allow_untested_optimizer": True,
}


def read(path: Path, config: Config = RUN, *, bf16: bool = False) -> dict[str, Any]:
    return read_ds_config(path, config, BatchSizes.share(config, world_size=2), 2, bf16=bf16)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "zero.json"


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_auto_of_the_shipped_files_is_filled_in(stage: int) -> None:
    settings = read(CONFIGS / f"zero{stage}.json")
    assert '"auto"' not in json.dumps(settings)
    assert {key: settings[key] for key in FILLED} == FILLED
    assert settings["zero_optimization"]["stage"] == stage
    assert settings["bf16"]["enabled"] is False


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeeds_own_clipping_checks_and_timers_which_wait_for_the_device_are_off(stage: int) -> None:
    """fastjepa's optimizer clips and skips by a norm on the device; a timer would synchronise around every micro batch."""
    from deepspeed.runtime.config import DeepSpeedConfig

    config = small_config(optim=RUN.optim)
    settings = read_ds_config(CONFIGS / f"zero{stage}.json", config, BatchSizes.share(config, 1), 1, bf16=True)
    parsed = DeepSpeedConfig(settings)
    assert parsed.gradient_clipping == 0
    assert not parsed.bfloat16_config.check_grad_overflow
    assert not parsed.timers_config.enabled
    assert parsed.zero_config.compute_grad_norm == (stage in (0, 3))  # these stages refuse to go without


def test_keys_that_a_file_leaves_out_are_filled_in(file: Path) -> None:
    file.write_text("{}")
    bf16 = {"enabled": False, "check_grad_overflow": False}
    never = {"gradient_clipping": 0.0, "timers": {"throughput": {"enabled": False}}}
    assert read(file) == {**FILLED, **never, "zero_optimization": {"stage": 0}, "bf16": bf16}


def test_values_equal_to_the_run_are_accepted(file: Path) -> None:
    ours = {**FILLED, "gradient_clipping": 0.5, "bf16": {"enabled": True}, "zero_optimization": {"stage": 2}}
    file.write_text(json.dumps(ours))
    settings = read(file, bf16=True)
    assert {key: settings[key] for key in FILLED} == FILLED
    assert settings["bf16"]["enabled"] is True


@pytest.mark.parametrize(
    ("key", "theirs", "ours"),
    [
        ("train_batch_size", 16, "global_batch_size = 12"),
        ("train_micro_batch_size_per_gpu", 4, "micro_batch_size = 2"),
        ("gradient_accumulation_steps", 1, "global_batch_size / (micro_batch_size * 2 ranks) = 3"),
        ("gradient_clipping", 1.0, "optim.clip_grad = 0.5"),
        ("zero_allow_untested_optimizer", False, "the optimizer that fastjepa brings, which needs it = True"),
    ],
)
def test_a_contradiction_names_file_key_and_both_values(file: Path, key: str, theirs: Any, ours: str) -> None:
    file.write_text(json.dumps({key: theirs}))
    with pytest.raises(ConfigError) as caught:
        read(file)
    assert f"{file}: {key} = {theirs!r} contradicts {ours}" in str(caught.value)


@pytest.mark.parametrize("key", ["bf16.check_grad_overflow", "zero_optimization.compute_grad_norm"])
def test_keys_that_make_the_host_wait_for_the_device_are_refused(file: Path, key: str) -> None:
    section, name = key.split(".")
    file.write_text(json.dumps({"zero_optimization": {"stage": 2}} | {section: {"stage": 2, name: True}}))
    with pytest.raises(ConfigError, match=rf"{key} = True contradicts .* without waiting for the GPU = False"):
        read(file)


def test_bf16_must_agree_with_the_precision_of_the_run(file: Path) -> None:
    file.write_text(json.dumps({"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}}))
    with pytest.raises(ConfigError, match=r"bf16\.enabled = True contradicts precision = False"):
        read(file)


def test_bf16_at_stage_0_is_left_to_autocast(file: Path) -> None:
    file.write_text(json.dumps({"zero_optimization": {"stage": 0}, "bf16": {"enabled": "auto"}}))
    assert read(file, bf16=True)["bf16"]["enabled"] is False
    file.write_text(json.dumps({"zero_optimization": {"stage": 0}, "bf16": {"enabled": True}}))
    with pytest.raises(ConfigError, match="autocast over fp32 weights"):
        read(file, bf16=True)


def test_a_misspelt_key_is_refused(file: Path) -> None:
    file.write_text(json.dumps({"zero_optimisation": {"stage": 2}}))
    with pytest.raises(ConfigError, match=r"keys \['zero_optimisation'\] are unknown or not supported"):
        read(file)


@pytest.mark.parametrize("key", REFUSED)
def test_keys_that_would_break_the_run_are_refused_with_the_reason(file: Path, key: str) -> None:
    section, _, name = key.rpartition(".")
    value: dict[str, Any] = {name: {"enabled": True}}
    file.write_text(json.dumps({section: value} if section else value))
    with pytest.raises(ConfigError) as caught:
        read(file)
    assert str(caught.value) == f"{file}: {key} is not supported: {REFUSED[key]}. Remove the key"


def test_a_refused_section_that_is_turned_off_is_accepted(file: Path) -> None:
    file.write_text(json.dumps({"fp16": {"enabled": False}}))
    assert read(file)["train_batch_size"] == 12


@pytest.mark.parametrize("stage", [-1, 4, "2", None, [2]])
def test_a_stage_out_of_range_is_refused(file: Path, stage: Any) -> None:
    file.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    with pytest.raises(ConfigError, match=r"zero_optimization\.stage = .*: expected 0, 1, 2 or 3"):
        read(file)


@pytest.mark.parametrize("text", ["{", "", "\udcff", "[1]", "2", '{"zero_optimization": 2}', '{"bf16": true}'])
def test_a_file_that_is_no_json_object_is_refused(file: Path, text: str) -> None:
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError, match=r"cannot read this DeepSpeed configuration|expected a JSON object") as caught:
        read(file)
    assert str(file) in str(caught.value)


def test_a_missing_file_is_named(file: Path) -> None:
    with pytest.raises(ConfigError, match=r"zero\.json: cannot read this DeepSpeed configuration: .*No such file"):
        read(file)
