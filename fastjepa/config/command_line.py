"""The command-line arguments that describe a run, shared by all commands that take them, and the files that they name."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastjepa.config.shipped import DEFAULT_CONFIG, find_config


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `section.key=value ...`, --config and --ds_config. Parse them with `parse_intermixed_args`, in any order."""
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="settings that replace those of the configuration"
    )
    parser.add_argument("--config", help="YAML file of the run, or a shipped one by name (default: default)")
    parser.add_argument(
        "--ds_config", help="DeepSpeed JSON, or zero0, zero1, zero2 or zero3; without it: plain PyTorch"
    )


def config_file(args: argparse.Namespace) -> Path:
    """The file that --config names, or that of the default run."""
    return DEFAULT_CONFIG if args.config is None else find_config(args.config)


def ds_config_file(args: argparse.Namespace) -> Path | None:
    """The file that --ds_config names; None: plain PyTorch."""
    return None if args.ds_config is None else find_config(args.ds_config)
