"""The command line: fastjepa doctor [--config RUN.yaml] [section.key=value ...]

Exit status: 0 if there are no problems; 1 if there are some, with which the run would not start or give wrong results; 2 if
the arguments or the configuration are wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

from fastjepa.config import command_line
from fastjepa.doctor import judge_installation
from fastjepa.doctor.diagnosis import Report, format_report
from fastjepa.doctor.host_facts import gather_host_facts
from fastjepa.doctor.probe_process import ProbeProcess, print_progress
from fastjepa.errors import ConfigError, FastjepaError


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="fastjepa doctor",
        description="Find what limits a run and what keeps it from starting. The run's folder is left as it is.",
    )
    command_line.add_run_arguments(parser)
    parser.add_argument("--ranks", type=int, help="ranks of the run on this machine (default: one per GPU, or one)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the report to this file")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    args = parser.parse_intermixed_args(argv)
    if args.ranks is not None and args.ranks < 1:
        parser.error(f"--ranks {args.ranks}: expected 1 or more")
    return args


def examine(args: argparse.Namespace) -> Report:
    """Examine the installation, and then the run, unless the installation has problems.

    Raises:
        ConfigError: the configuration, or the DeepSpeed JSON, is wrong.
    """
    print_progress("checking the installation")
    host = gather_host_facts()
    names = ["pytorch", "deepspeed", "dali", *(["apex"] if host.has_apex else [])]
    with ExitStack() as stack:
        probes = {name: stack.enter_context(ProbeProcess(name)) for name in names}
        pytorch = probes["pytorch"].outcome()
        findings = [*judge_installation.judge_host(host), *judge_installation.judge_pytorch(pytorch, host)]
        if any(finding.level == "problem" for finding in findings):
            return Report(installation=findings, verdict="unknown: repair the installation first, then run this again")
        # These import torch, which works: the probe did it.
        from fastjepa.doctor.examine import examine_run
        from fastjepa.objectives.registry import load_config

        config = load_config(command_line.config_file(args), args.overrides)
        outcomes = {name: probe.outcome() for name, probe in probes.items()}
    return examine_run(config, args, host, outcomes, findings)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    # Under a launcher, rank 0 examines the run for all ranks. The probes must not take themselves for ranks of it.
    world_size, rank = int(os.environ.pop("WORLD_SIZE", "0")), int(os.environ.pop("RANK", "0"))
    if rank:
        return 0
    args.ranks = args.ranks or world_size or None
    try:
        if args.json:
            _write(args.json, "", "a")  # fails now if it must, not after a minute of measuring
        report = examine(args)
        print(format_report(report), flush=True)
        if args.json:
            _write(args.json, json.dumps(report.as_dict(), indent=2) + "\n", "w")
    except FastjepaError as error:
        print(f"fastjepa: error: {error}", file=sys.stderr)
        return 2
    return 1 if report.problems else 0


def _write(path: Path, text: str, mode: Literal["a", "w"]) -> None:
    try:
        with path.open(mode, encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise ConfigError(f"--json {path}: cannot be written ({error.strerror})") from error


if __name__ == "__main__":
    sys.exit(main())
