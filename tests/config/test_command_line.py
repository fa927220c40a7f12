"""The arguments that describe a run, and the files that they name."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastjepa.config import command_line
from fastjepa.config.shipped import SHIPPED
from fastjepa.objectives.registry import load_config


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command_line.add_run_arguments(parser)
    return parser.parse_intermixed_args(words)


def test_settings_of_the_command_line_replace_those_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("seed: 3\nglobal_batch_size: 32\n")
    args = parse("seed=4", "--config", str(file), "--ds_config", "zero2.json", "data.num_threads=2")
    assert command_line.config_file(args) == file
    config = load_config(command_line.config_file(args), args.overrides)
    assert (config.seed, config.global_batch_size, config.data.num_threads) == (4, 32, 2)


def test_shipped_files_are_found_by_name() -> None:
    args = parse("--config", "debug", "--ds_config", "zero2")
    assert command_line.config_file(args) == SHIPPED / "debug.yaml"
    assert command_line.ds_config_file(args) == SHIPPED / "zero2.json"


def test_without_arguments_the_run_is_the_default_run_with_plain_pytorch() -> None:
    assert command_line.config_file(parse()) == SHIPPED / "default.yaml"
    assert command_line.ds_config_file(parse()) is None
