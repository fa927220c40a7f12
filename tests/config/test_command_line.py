"""The arguments that describe a run."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from fastjepa.config import command_line
from fastjepa.errors import ConfigError


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command_line.add_run_arguments(parser)
    return parser.parse_intermixed_args(words)


def test_settings_of_the_command_line_replace_those_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("seed: 3\nglobal_batch_size: 32\n")
    args = parse("seed=4", "--config", str(file), "--ds_config", "zero2.json", "data.num_threads=2")
    config = command_line.resolve(args)
    assert (config.seed, config.global_batch_size, config.data.num_threads) == (4, 32, 2)
    assert args.ds_config == "zero2.json"
    assert command_line.config_file(args) == str(file)


def test_without_a_file_the_run_is_the_default_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert command_line.config_file(parse()).endswith("configs/default.yaml")
    assert command_line.resolve(parse()).data.source == "fashion_mnist"
    monkeypatch.setattr(command_line, "DEFAULT_CONFIG", tmp_path / "default.yaml")
    with pytest.raises(ConfigError, match=r"no --config given, and configs/default\.yaml is not there"):
        command_line.resolve(parse())
