"""Reading and writing settings: what is accepted, what is refused, and messages that say how to mend it."""

import dataclasses
import logging
import re
from pathlib import Path
from typing import Any

import pytest

from fastjepa.config import Config, DataConfig, ModelConfig, OptimConfig
from fastjepa.config.file import dump_config
from fastjepa.errors import ConfigError
from fastjepa.objectives.ijepa.block_sizes import MaskConfig
from fastjepa.objectives.ijepa.settings import IJEPAConfig, Savings
from fastjepa.objectives.registry import load_config


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The path of a configuration that the test writes."""
    return tmp_path / "run.yaml"


def config_with(**settings: Any) -> Config:
    """The defaults, with I-JEPA as the objective unless another is given."""
    return Config(**({"objective": IJEPAConfig()} | settings))


def refusal(path: Path | None, *overrides: str) -> str:
    """The message with which a file and overrides are refused."""
    with pytest.raises(ConfigError) as raised:
        load_config(path, overrides)
    return str(raised.value)


def test_no_file_gives_the_defaults() -> None:
    assert load_config(None) == config_with()


@pytest.mark.parametrize("text", ["", "# only a comment\n", "optim:\n  # lr: 1e-4\n", "null\n"])
def test_an_empty_file_or_section_gives_the_defaults(file: Path, text: str) -> None:
    file.write_text(text)
    assert load_config(file) == config_with()


def test_a_file_replaces_the_defaults_and_the_command_line_the_file(file: Path) -> None:
    file.write_text("seed: 3\noptim:\n  lr: 2e-3\n  eps: 1e-6\ndata: {image_size: [224, 448]}\n")
    config = load_config(file, ["optim.lr=4e-3", "optim.lr=5e-3", "objective.savings.target_last_block=false"])
    assert config == config_with(
        seed=3,
        optim=OptimConfig(lr=5e-3, eps=1e-6),
        data=DataConfig(image_size=(224, 448)),
        objective=IJEPAConfig(savings=Savings(target_last_block=False)),
    )


def test_a_section_is_overridden_in_one_piece() -> None:
    config = load_config(None, ["optim={lr: 1e-4, betas: [0.9, 0.95]}"])
    assert config.optim == OptimConfig(lr=1e-4, betas=(0.9, 0.95))


@pytest.mark.parametrize(("text", "number"), [("1e-3", 1e-3), ("1E3", 1e3), ("2", 2.0), ("+.5", 0.5), ("1_0.0", 10.0)])
def test_every_spelling_of_a_number_is_a_number(text: str, number: float) -> None:
    """YAML 1.1 reads 1e-3, which has no point, as text."""
    epochs = load_config(None, [f"epochs={text}"]).epochs
    assert isinstance(epochs, float)
    assert epochs == number


@pytest.mark.parametrize("text", ["2024-01-01", "yes", "12", "1e3", "a=b", "'null'", "/data/my images"])
def test_text_is_taken_as_it_is_written(text: str) -> None:
    """YAML 1.1 reads most of these as a date, a truth value or a number."""
    assert load_config(None, [f"output_dir={text}"]).output_dir == text.strip("'")


def test_null_is_accepted_where_the_setting_allows_it() -> None:
    config = load_config(None, ["data.crop_scale=null", "optim.clip_grad=~"])
    assert config.data.crop_scale is None
    assert config.optim.clip_grad is None


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seed=true", "a whole number"),
        ("seed=1.0", "a whole number"),
        ("seed='1'", "a whole number"),
        ("seed=0x10", "a whole number"),
        ("seed=null", "a whole number"),
        ("epochs=many", "a number"),
        ("epochs=.inf", "a number"),
        ("epochs=inf", "a number"),
        ("epochs=nan", "a number"),
        ("epochs=1e999", "a number"),
        ("evaluate=1", "true or false"),
        ("evaluate='true'", "true or false"),
        ("output_dir=", "text"),
        ("output_dir=[a]", "text"),
        ("precision=fp16", "one of: auto, fp32, bf16"),
        ("micro_batch_size=a", "a whole number or null"),
        ("data.image_size=[224]", "a whole number or a list of 2 whole numbers"),
        ("data.crop_scale=[0.3, 1, 1]", "a list of 2 numbers or null"),
        ("data.mean=0.5", "a list of numbers"),
        ("data.mean=[0.5, a, 0.5]", "a list of numbers"),
        ("objective.savings=all", "a section with the keys gather_before_embed, target_last_block,"),
    ],
)
def test_a_wrong_type_is_refused_in_plain_words(override: str, expected: str) -> None:
    key, _, value = override.partition("=")
    assert f"command line: {key} = {value or 'nothing'}: expected {expected}" in refusal(None, override)


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("seeed", "seed"),
        ("lr", "optim.lr"),
        ("data.lr", "optim.lr"),
        ("optm.lr", "optim.lr"),
        ("optm", "optim"),
        ("model.min_keep", "objective.masks.min_keep"),
        ("optim.ema", "optim.ema_momentum"),
        ("batch_size", "micro_batch_size"),
        ("objective.predictor_last_block", "objective.savings.predictor_last_block"),
    ],
)
def test_an_unknown_key_names_the_nearest_valid_one(key: str, nearest: str) -> None:
    assert refusal(None, f"{key}=1") == f"command line: unknown key {key}; did you mean {nearest}?"


def test_an_unknown_key_unlike_any_other_lists_those_of_its_section() -> None:
    message = refusal(None, "objective.xyz=1")
    keys = ", ".join(f"objective.{field.name}" for field in dataclasses.fields(IJEPAConfig))
    assert message == f"command line: unknown key objective.xyz; valid keys: {keys}"
    assert "objective.loss, objective.normalize_targets, " in keys


def test_all_problems_are_reported_at_once_with_their_lines(file: Path) -> None:
    file.write_text("seeed: 1\noptim:\n  # a comment\n  lr: fast\n  beta: 2\n  lr: 1\nprecision: fp16\n")
    assert refusal(file, "epochs=x").splitlines() == [
        f"{file}, line 1: unknown key seeed; did you mean seed?",
        f"{file}, line 4: optim.lr = fast: expected a number",
        f"{file}, line 5: unknown key optim.beta; did you mean optim.betas?",
        f"{file}, line 6: optim.lr is given twice: remove one",
        f"{file}, line 7: precision = fp16: expected one of: auto, fp32, bf16",
        "command line: epochs = x: expected a number",
    ]


@pytest.mark.parametrize(
    "text", ["seed: 1\nseed: 2\n", "optim: {lr: 1}\noptim: {eps: 1}\n", "optim.lr: 1\noptim: {lr: 2}\n"]
)
def test_a_repeated_key_is_refused(file: Path, text: str) -> None:
    file.write_text(text)
    assert "is given twice" in refusal(file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\ndata: [1, 2\n", ", line 3: not valid YAML: while parsing a flow sequence"),
        ("optim:\n\tlr: 1\n", ", line 2: not valid YAML: while scanning for the next token, found character '\\t'"),
        ("seed: 1\n---\nseed: 2\n", ", line 2: not valid YAML: expected a single document"),
        ("seed: 1\n# \0\n", ", line 2: not valid YAML: special characters are not allowed: U+0000"),
        ("- seed\n", ", line 1: expected lines of `key: value`, got - seed"),
        ("seed = 1\n", ", line 1: expected lines of `key: value`, got seed = 1"),
        ("[a]: 1\n", ", line 1: unknown key [a]; valid keys: seed, "),
    ],
)
def test_a_file_that_is_no_mapping_is_refused_with_its_line(file: Path, text: str, message: str) -> None:
    file.write_text(text)
    assert refusal(file).startswith(f"{file}{message}")


def test_yaml_tags_run_no_code(file: Path, tmp_path: Path) -> None:
    file.write_text(f"output_dir: !!python/object/apply:os.mkdir ['{tmp_path}/made']\n")
    assert "output_dir = " in refusal(file)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("override", ["seed", "--seed", ""])
def test_an_override_without_a_value_is_refused(override: str) -> None:
    assert refusal(None, override) == f"command line: {override}: expected section.key=value, such as optim.lr=1e-3"


def test_an_override_that_is_not_yaml_is_refused() -> None:
    assert refusal(None, "data.mean=[1,").startswith("command line: data.mean: [1,: not valid YAML: ")


@pytest.mark.parametrize("name", ["''", "mae"])
def test_an_unknown_method_is_refused_with_its_source(file: Path, name: str) -> None:
    file.write_text(f"objective: {{name: {name}}}\n")
    with pytest.raises(ConfigError, match=rf"{re.escape(str(file))}: objective\.name = {name}: expected one of: ijepa"):
        load_config(file)


@pytest.mark.parametrize("key", ["output_dir", "resume"])
def test_an_empty_path_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key} = '': expected a path"):
        load_config(None, [f"{key}=''"])


def test_yaml_that_refers_to_itself_is_refused(file: Path) -> None:
    file.write_text("data: &data\n  data: *data\n")
    with pytest.raises(ConfigError, match=r"unknown key data\.data"):
        load_config(file)


def test_a_missing_file_names_the_ones_near_by(tmp_path: Path) -> None:
    (tmp_path / "default.yaml").touch()
    assert refusal(tmp_path / "defualt.yaml").endswith(f"; did you mean {tmp_path / 'default.yaml'}?")
    assert refusal(tmp_path / "zzz").endswith(f"; {tmp_path} holds default.yaml")
    assert refusal(tmp_path).endswith(f"; {tmp_path} holds default.yaml")
    assert refusal(tmp_path / "no" / "folder.yaml").endswith(f"; {tmp_path / 'no'} holds no .yaml file")


def test_a_file_that_is_not_text_is_refused(file: Path) -> None:
    file.write_bytes(b"\x89PNG\xff\xfe")
    assert refusal(file) == f"{file}: not UTF-8 text: expected a YAML file"


def test_a_value_that_cannot_work_names_every_source(file: Path) -> None:
    file.write_text("optim: {lr: -1}\n")
    assert refusal(file) == f"{file}: optim.lr = -1.0: expected 0 or more"
    assert refusal(file, "seed=1") == f"{file} and command line: optim.lr = -1.0: expected 0 or more"
    assert refusal(None, "data.image_size=225").startswith("command line: data.image_size = ")


def test_a_grid_without_a_valid_mask_is_refused_when_read() -> None:
    message = refusal(None, "data.image_size=64", "model.patch_size=16", "objective.masks.min_keep=15")
    assert message.startswith("command line: objective.masks.min_keep = 15: on a grid of 4x4 patches ")


# The objective


@pytest.mark.parametrize("name", ["nonsense", "I-JEPA", "1"])
def test_an_unknown_objective_is_refused_with_the_names_of_all(name: str, file: Path) -> None:
    expected = f"objective.name = {name}: expected one of: ijepa"
    assert refusal(None, f"objective.name={name}") == f"command line: {expected}"
    file.write_text(f"objective: {{name: {name}}}\n")
    assert refusal(file) == f"{file}: {expected}"


def test_the_last_name_of_an_objective_is_the_one_that_counts(file: Path) -> None:
    file.write_text("objective: {name: nonsense}\n")
    assert load_config(file, ["objective.name=ijepa"]) == config_with()


def test_a_key_that_the_objective_does_not_have_is_refused_with_the_nearest(file: Path) -> None:
    file.write_text("objective:\n  name: ijepa\n  predictor_width: 3\n  masks: {min_kept: 3}\n")
    assert refusal(file).splitlines() == [
        f"{file}, line 3: unknown key objective.predictor_width; did you mean objective.predictor_depth?",
        f"{file}, line 4: unknown key objective.masks.min_kept; did you mean objective.masks.min_keep?",
    ]


def test_settings_of_objective_and_model_that_do_not_fit_each_other_are_refused() -> None:
    assert refusal(None, "objective.predictor_embed_dim=100") == (
        "command line: objective.predictor_embed_dim = 100: expected a multiple of model.num_heads = 12"
    )
    assert refusal(None, "compile=cuda_graphs").startswith(
        "command line: compile = 'cuda_graphs': expected objective.masks."
    )


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("masks.min_keep=4", {"objective.masks.min_keep": 4}),
        ("masks={min_keep: 4, mode: budget}", {"objective.masks.min_keep": 4, "objective.masks.mode": "budget"}),
        ("model.predictor_depth=2", {"objective.predictor_depth": 2}),
        ("model.predictor_embed_dim=192", {"objective.predictor_embed_dim": 192}),
        ("model={predictor_depth: 2, depth: 3}", {"objective.predictor_depth": 2, "model.depth": 3}),
    ],
)
def test_a_key_of_an_earlier_version_is_read_and_the_warning_names_the_new_one(
    old: str, new: dict[str, object], file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = load_config(None, [f"{key}={value}" for key, value in new.items()])
    assert not caplog.messages
    key, _, value = old.partition("=")
    file.write_text(f"{key}: {value}\n")
    with caplog.at_level(logging.WARNING):
        assert load_config(None, [old]) == load_config(file) == expected != config_with()
    (on_command_line, in_file) = caplog.messages
    assert on_command_line.startswith("command line: read by the names that settings have today: ")
    assert in_file.startswith(f"{file}: read by the names that settings have today: ")
    renamed = next(iter(new)) if "{" not in old else None
    if renamed:
        assert on_command_line.endswith(f"{key} is now {renamed}")
    assert " is now objective." in on_command_line


def test_a_file_of_an_earlier_version_is_read_with_one_warning(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    file.write_text(
        "model: {predictor_embed_dim: 192, predictor_depth: 2}\nmasks: {mode: budget}\nobjective: {loss: l2}\n"
    )
    with caplog.at_level(logging.WARNING):
        config = load_config(file)
    assert config.objective == IJEPAConfig(
        predictor_embed_dim=192, predictor_depth=2, masks=MaskConfig(mode="budget"), loss="l2"
    )
    assert caplog.messages == [
        f"{file}: read by the names that settings have today: "
        "model.predictor_embed_dim is now objective.predictor_embed_dim, "
        "model.predictor_depth is now objective.predictor_depth, masks is now objective.masks"
    ]


def test_a_setting_under_its_old_and_its_new_name_is_given_twice(file: Path) -> None:
    file.write_text("masks: {min_keep: 3}\nobjective: {masks: {min_keep: 4}}\n")
    assert refusal(file).endswith("is given twice: remove one")


# Writing


def test_a_written_file_is_read_as_the_same_settings(file: Path) -> None:
    config = config_with(
        seed=2**63 - 1,
        output_dir="runs/ü: 'a' #1\n\\x",
        epochs=1 / 3,
        micro_batch_size=7,
        resume="null",
        evaluate=False,
        data=DataConfig(
            source="2024-01-01", image_size=(96, 128), in_channels=1, crop_scale=None, mean=(1e-7,), std=(3.0,)
        ),
        model=ModelConfig(name="vit_giant", patch_size=8, mlp_ratio=3.5),
        objective=IJEPAConfig(masks=MaskConfig(mode="budget", context_budget=0.2), predictor_depth=3),
        optim=OptimConfig(clip_grad=1e-30, final_lr=0.0),
    )
    file.write_text(dump_config(config), encoding="utf-8")
    assert load_config(file) == config.resolved()
    assert dump_config(load_config(file)) == dump_config(config)


def test_dump_writes_every_setting_in_the_order_of_the_dataclasses() -> None:
    text = dump_config(config_with())
    top = [line.partition(":")[0] for line in text.splitlines() if not line.startswith(" ")]
    assert top == [field.name for field in dataclasses.fields(Config)]
    optim_text = text.partition("\noptim:\n")[2].partition("\nkernels:\n")[0]
    optim = [line.strip().partition(":")[0] for line in optim_text.splitlines()]
    assert optim == [field.name for field in dataclasses.fields(OptimConfig)]
    assert "  betas: [0.9, 0.999]\n" in text


def test_dump_writes_no_null_in_place_of_a_value_of_the_named_model() -> None:
    text = dump_config(config_with(model=ModelConfig(name="vit_huge", patch_size=14)))
    for line in ("embed_dim: 1280", "depth: 32", "num_heads: 16", "mlp_ratio: 4.0", "predictor_depth: 12"):
        assert f"\n  {line}\n" in text
