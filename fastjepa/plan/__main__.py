"""Recommend a ZeRO stage and a micro batch: python -m fastjepa.plan --model vit_huge --gpus 64 --memory 80

Formulas give the state, activations, bytes sent and FLOPs of a run. From them follow, for plain PyTorch and every ZeRO
stage, the largest micro batch that fits and the images/s that a roofline allows. Nothing is measured: the figures are
bounds under the assumptions that are printed with them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastjepa.config import MODEL_SIZES
from fastjepa.config.shipped import find_config
from fastjepa.errors import ConfigError, FastjepaError
from fastjepa.host import GIB
from fastjepa.objectives.registry import load_config
from fastjepa.plan.datasheets import DEVICES
from fastjepa.plan.planner import Cluster, assumptions, count, plan_stage, recommend, remedies
from fastjepa.plan.tables import format_table, start_command, write_tables
from fastjepa.plan.zero import STAGES


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m fastjepa.plan",
        description="Recommend a ZeRO stage and a micro batch for a model on a number of GPUs.",
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings, as for fastjepa/train.py")
    parser.add_argument(
        "--config", help="YAML file of a run, or the name of a shipped one (default: the official settings)"
    )
    parser.add_argument("--model", choices=sorted(MODEL_SIZES), help="short for model.name=...")
    parser.add_argument("--patch_size", help="short for model.patch_size=...")
    parser.add_argument("--gpus", type=int, default=8, help="number of GPUs (default: %(default)s)")
    parser.add_argument("--device", choices=sorted(DEVICES), default="h100", help="type of GPU (default: %(default)s)")
    parser.add_argument("--memory", type=float, default=80, help="memory per GPU in GiB (default: %(default)s)")
    parser.add_argument("--gpus_per_node", type=int, default=8, help="GPUs in each node (default: %(default)s)")
    parser.add_argument(
        "--network", type=float, default=400, help="bandwidth between nodes per GPU, in Gbit/s (default: %(default)s)"
    )
    parser.add_argument(
        "--utilisation", type=float, default=0.5, help="share of peak FLOP/s that a run reaches (default: %(default)s)"
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write plans and assumptions to this file")
    parser.add_argument(
        "--table", metavar="FILE", type=Path, help="only update the tables in this Markdown file (docs/plan.md)"
    )
    return parser.parse_intermixed_args(argv)


def run(args: argparse.Namespace) -> int:
    short = {"model.name": args.model, "model.patch_size": args.patch_size}
    overrides = [*(f"{key}={value}" for key, value in short.items() if value is not None), *args.overrides]
    config = load_config(None if args.config is None else find_config(args.config), overrides)
    cluster = Cluster(
        device=DEVICES[args.device], gpus=args.gpus, memory=args.memory, gpus_per_node=args.gpus_per_node,
        network=args.network, utilisation=args.utilisation,
    )  # fmt: skip
    plans = [plan_stage(config, cluster, stage) for stage in STAGES]
    notes = assumptions(config, cluster)
    chosen = recommend(plans)
    print(f"{config.model.name}/{config.model.patch_size} on {cluster.gpus} x {cluster.device.name}, "
          f"{cluster.memory:g} GiB, global batch {config.global_batch_size}: upper bounds, not promises.")  # fmt: skip
    print("images/s count all GPUs; the rest is per GPU; sizes are those at the moment that needs the most memory\n")
    print(format_table(plans))
    print("\nassumed:\n" + "\n".join(f"  - {note}" for note in notes))
    command = None
    if chosen:
        plan, reason = chosen
        command = start_command(plan, cluster, args.config, overrides)
        print(f"\n{plan.name}, micro batch {plan.micro}: {reason}\n\n  {command}")
        if not args.config:
            print("\nRUN.yaml: your file with data.source and every other setting that differs from the official ones")
    if args.json:
        report: dict[str, Any] = {
            "plans": [dataclasses.asdict(plan) for plan in plans],
            "recommended": chosen[0].stage if chosen else None,
            "command": command,
            "assumptions": notes,
        }
        try:
            args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--json {args.json}: cannot be written ({error.strerror})") from error
    if chosen:
        return 0
    fitting = remedies(config, cluster)
    least = min(plans, key=lambda plan: plan.state + plan.activations_per_image)
    raise ConfigError(
        f"{config.model.name} does not fit {count(cluster.gpus, 'GPU')} with {cluster.memory:g} GiB: {least.name} needs "
        f"{least.state / GIB:.1f} GiB of state and {least.activations_per_image / GIB:.1f} GiB for one image, "
        f"{cluster.usable / GIB:.1f} GiB are usable. "
        + (
            f"What would fit: {'; '.join(fitting)}"
            if fitting
            else "Use a smaller model, larger patches or smaller images"
        )
    )


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        if args.table:
            write_tables(args.table)
            return 0
        return run(args)
    except FastjepaError as error:
        print(f"fastjepa: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends the command silently
    sys.exit(main())
