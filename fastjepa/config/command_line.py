"""The command-line arguments that describe a run, shared by all commands that take them, and the configuration they give."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastjepa.config.file import load_config
from fastjepa.config.settings import Config
from fastjepa.errors import ConfigError

DEFAULT_CONFIG = Path(__file__).resolve().parents[2] / "configs" / "default.yaml"


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `section.key=value ...`, --config and --ds_config. Parse them with `parse_intermixed_args`, in any order."""
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="settings that replace those of the configuration"
    )
    parser.add_argument("--config", help="YAML file of the run (default: configs/default.yaml)")
    parser.add_argument("--ds_config", help="DeepSpeed JSON, such as configs/zero2.json; without it: plain PyTorch")


def config_file(args: argparse.Namespace) -> str:
    """The file of --config, or that of the default run.

    Raises:
        ConfigError: --config is not given, and the default run's file is not there.
    """
    if args.config is not None:
        return str(args.config)
    if not DEFAULT_CONFIG.is_file():
        raise ConfigError("no --config given, and configs/default.yaml is not there (it comes with the repository)")
    return str(DEFAULT_CONFIG)


def resolve(args: argparse.Namespace) -> Config:
    """The configuration of the run: its file, with the settings of the command line in place of the file's.

    Raises:
        ConfigError: the file or a setting is wrong, or there is no file.
    """
    return load_config(config_file(args), args.overrides)
