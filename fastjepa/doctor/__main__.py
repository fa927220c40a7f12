"""fastjepa doctor [--config RUN.yaml] [section.key=value ...]: what limits a run, and what stands in its way.

Exit status: 0: nothing does; 1: there are problems, with which the run would not start or give wrong results; 2: an error.
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

from fastjepa.doctor import installation
from fastjepa.doctor.diagnosis import Report, format_report
from fastjepa.doctor.probes import Running, say
from fastjepa.errors import ConfigError, FastjepaError


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="fastjepa doctor",
        description="What limits a run, and what stands in its way. Nothing of the run is written.",
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings, as for fastjepa/train.py")
    parser.add_argument("--config", help="YAML file of the run, or a shipped one by name (default: default)")
    parser.add_argument("--ds_config", help="DeepSpeed JSON that the run is started with; without it: plain PyTorch")
    parser.add_argument("--ranks", type=int, help="of the run, on this machine (default: one for each GPU, or one)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the report there too")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    args = parser.parse_intermixed_args(argv)
    if args.ranks is not None and args.ranks < 1:
        parser.error(f"--ranks {args.ranks}: expected 1 or more")
    return args


def examine(args: argparse.Namespace) -> Report:
    """
    Raises:
        ConfigError: the configuration, or the DeepSpeed JSON, is wrong.
    """
    say("looking at the installation")
    host = installation.look_at_host()
    names = ["pytorch", "deepspeed", "dali", *(["apex"] if host.apex_is_there else [])]
    with ExitStack() as stack:
        probes = {name: stack.enter_context(Running(name)) for name in names}
        pytorch = probes["pytorch"].outcome()
        findings = [*installation.judge_host(host), *installation.judge_pytorch(pytorch, host)]
        if any(finding.level == "problem" for finding in findings):
            return Report(installation=findings, verdict="not known: the installation has to be mended first")
        from fastjepa.doctor.examine import examine_run  # here, not above: it needs a torch that works
        from fastjepa.train import resolve_config

        config = resolve_config(argparse.Namespace(**vars(args), resume=None))
        outcomes = {name: probe.outcome() for name, probe in probes.items()}
    return examine_run(config, args, host, outcomes, findings)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    # Under a launcher one rank looks at what all would do; what it starts is alone.
    ranks, rank = int(os.environ.pop("WORLD_SIZE", "0")), int(os.environ.pop("RANK", "0"))
    if rank:
        return 0
    args.ranks = args.ranks or ranks or None
    try:
        if args.json:
            _write(args.json, "", "a")  # an error comes now, not after a minute
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
