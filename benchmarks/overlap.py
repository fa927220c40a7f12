"""Communication that hides under computation at ZeRO 1 and 2: python -m benchmarks.overlap --output benchmarks/results

Two ranks on the CPU train with DeepSpeed's own gather of the weights, which the step waits for, and with fastjepa's, which
runs under the next step. Blocks of steps take turns, and the ratio of the median times is printed. Two steps with fastjepa's
gather are traced: overlap.png shows rank 0, overlap.trace.json is for chrome://tracing or https://ui.perfetto.dev.

On one machine the ranks communicate through memory, which takes computing time from them. `--gbit 10` puts them into
a network namespace of their own (Linux, as root) whose traffic passes at 10 Gbit/s, as over a cable.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._profiler import _ExperimentalConfig
from torch.profiler import ProfilerActivity, profile

from benchmarks.launch import ROOT, launch
from benchmarks.loader.photographs import make_photographs
from fastjepa import distributed
from fastjepa.config import Config, DataConfig, ModelConfig
from fastjepa.config.batch_sizes import BatchSizes
from fastjepa.data import Loader, open_dataset
from fastjepa.engine.deepspeed_engine import DeepSpeedEngine
from fastjepa.objectives.ijepa.settings import IJEPAConfig
from fastjepa.objectives.registry import build_objective, method_of
from fastjepa.profiling.timing import summary

RANKS = 2
TIMED = 3
"""Timed steps of a block. One untimed step goes before, so that each of them begins while weights are under way."""
COMPUTE = ("context encoder", "target encoder", "predictor", "backward", "optimizer")
OURS, DEEPSPEEDS = "under the next step", "DeepSpeed's own"


def run_rank(folder: Path, options: argparse.Namespace) -> None:
    """Run the measurement as one rank. Rank 0 writes times.json and trace.json into `folder`."""
    torch.set_num_threads(1)
    device = distributed.init()
    config = Config(
        data=DataConfig(source=str(folder / "images"), num_threads=1),
        model=ModelConfig(name=options.model),
        objective=IJEPAConfig(),
        global_batch_size=RANKS * options.batch_size,
        precision="fp32",
    )
    sizes, method = BatchSizes.share(config, RANKS), method_of(config)
    dataset = open_dataset(config.data, "train")
    assert dataset is not None
    loader = Loader(
        dataset,
        config,
        method,
        rank=distributed.rank(),
        world_size=RANKS,
        micro_batch_size=sizes.micro,
        grad_accum_steps=sizes.accum,
        steps_per_epoch=len(dataset) // config.global_batch_size,
        start_step=0,
        total_steps=1 << 30,
        device=device,
    )
    engines = {
        name: DeepSpeedEngine(
            build_objective(method), method, config, sizes, device, ROOT / f"configs/zero{options.stage}.json"
        )
        for name in (DEEPSPEEDS, OURS)
    }
    engines[DEEPSPEEDS]._gather = None
    times: dict[str, list[float]] = {name: [] for name in engines}

    def steps(engine: DeepSpeedEngine, count: int) -> None:
        for _ in range(count):
            batch = next(loader)
            engine.micro_step(batch.prepared)

    with closing(loader):
        for turn in range(options.rounds + 1):
            for name, engine in engines.items():
                steps(engine, 1)
                dist.barrier()
                started = time.perf_counter()
                steps(engine, TIMED)
                dist.barrier()
                if turn > 0:  # the first round is the warm-up
                    times[name].append(1e3 * (time.perf_counter() - started) / TIMED)
                _ = engine.model  # waits for the weights, so that none travel during the next block
        steps(engines[OURS], 1)
        everything = _ExperimentalConfig(profile_all_threads=True)
        with profile(activities=[ProfilerActivity.CPU], experimental_config=everything) as trace:
            steps(engines[OURS], 2)
    if distributed.rank() == 0:
        trace.export_chrome_trace(str(folder / "trace.json"))
        (folder / "times.json").write_text(json.dumps(times))
    distributed.raise_together(None)
    distributed.finish()


def spans(trace: dict[str, Any]) -> list[tuple[str, float, float]]:
    """Name, start and end of every phase, collective and loader span, in ms after the first start."""
    kept = [
        event
        for event in trace["traceEvents"]
        if event.get("ph") == "X"
        and (event["name"] in (*COMPUTE, "waiting for weights", "loader") or event["name"].startswith("gloo:"))
    ]
    start = min(event["ts"] for event in kept)
    return sorted(
        (event["name"], (event["ts"] - start) / 1e3, (event["ts"] + event["dur"] - start) / 1e3) for event in kept
    )


def shares(found: list[tuple[str, float, float]]) -> dict[str, float]:
    """Transfer of the first traced step's weights: ms under way, ms that the second step waits, the hidden share."""
    first_sent, second_sent = sorted(start for name, start, _ in found if name == "optimizer")
    gathers = [(start, end) for name, start, end in found if name == "gloo:all_gather" and start < second_sent]
    waits = [(start, end) for name, start, end in found if name == "waiting for weights" and start > first_sent]
    under_way = max(end for _, end in gathers) - min(start for start, _ in gathers)
    waited = sum(end - start for start, end in waits)
    return {"weights_under_way_ms": under_way, "waited_ms": waited, "hidden_share": 1 - waited / under_way}


def plot(found: list[tuple[str, float, float]], title: str, path: Path) -> None:
    """Draw one row each for the step's phases, its waiting, each kind of collective, and the loader."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    colours = dict(zip(COMPUTE, ("#1b6ca8", "#d98e04", "#5aa469", "#7d7abc", "#8c564b"), strict=True))
    colours["waiting for weights"] = "#c0392b"
    lines = dict.fromkeys(COMPUTE, 4)
    lines |= {"waiting for weights": 3, "gloo:all_gather": 2, "gloo:all_reduce": 1, "gloo:reduce": 1, "loader": 0}
    figure, axis = plt.subplots(figsize=(13, 3.4), layout="constrained")
    for name in lines:
        bars = [(start, end - start) for each, start, end in found if each == name]
        colour = colours.get(name, "#7f8c8d")
        label = name if name in COMPUTE else None
        axis.broken_barh(bars, (lines[name] - 0.35, 0.7), color=colour, edgecolor=colour, linewidth=0.5, label=label)
    names = ["loader", "gradients travel", "weights travel", "step waits for weights", "step computes"]
    axis.set_yticks(range(5), names)
    axis.set_xlabel("ms")
    axis.set_title(title, loc="left", fontsize=10)
    axis.legend(ncols=len(COMPUTE), loc="upper left", bbox_to_anchor=(0, -0.16), frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def enter_namespace(gbit: float) -> None:
    """Replace this process by the same command in a network namespace of its own. Does not return."""
    again = f"ip link set lo up && tc qdisc add dev lo root tbf rate {gbit}gbit burst 1mb latency 100ms && exec "
    command = [sys.executable, "-m", "benchmarks.overlap", *sys.argv[1:], "--inside"]
    os.execvp("unshare", ["unshare", "--net", "sh", "-c", again + '"$@"', "sh", *command])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for overlap.json and overlap.png")
    parser.add_argument("--model", default="vit_small", help="model.name (default: %(default)s)")
    parser.add_argument(
        "--batch_size", type=int, default=4, help="images per step of each of the two ranks (default: %(default)s)"
    )
    parser.add_argument("--stage", type=int, choices=(1, 2), default=2, help="ZeRO stage (default: %(default)s)")
    parser.add_argument(
        "--rounds", type=int, default=5, help=f"blocks of {TIMED} steps of each kind, 2 or more (default: %(default)s)"
    )
    parser.add_argument("--gbit", type=float, help="limit of what the ranks send together, in Gbit/s (default: none)")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--rank-in", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_in:
        run_rank(options.rank_in, options)
        return
    if options.rounds < 2:
        parser.error(f"--rounds {options.rounds}: expected 2 or more, for a median")
    if options.gbit and not options.inside:
        enter_namespace(options.gbit)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_photographs(folder / "images", (500, 375), 16 * RANKS * options.batch_size)
        launch("benchmarks.overlap", RANKS, *sys.argv[1:], "--rank-in", name, timeout=3600)
        times = {kind: summary(ms) for kind, ms in json.loads((folder / "times.json").read_text()).items()}
        text = (folder / "trace.json").read_text()
    found = spans(json.loads(text))
    result = {
        "command": "python -m benchmarks.overlap " + " ".join(a for a in sys.argv[1:] if a != "--inside"),
        "step_ms_p20_p50_p80": {kind: [t.p20, t.p50, t.p80] for kind, t in times.items()},
        "ratio_of_medians": times[OURS].p50 / times[DEEPSPEEDS].p50,
        **shares(found),
    }
    for key, value in result.items():
        print(f"{key:20s} {value}")
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "overlap.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (options.output / "overlap.trace.json").write_text(text, encoding="utf-8")
    network = f"{options.gbit:g} Gbit/s" if options.gbit else "memory of one machine"
    title = f"{options.model}, ZeRO {options.stage}, {RANKS} ranks on CPUs, {network}: two steps of rank 0"
    plot(found, title, options.output / "overlap.png")


if __name__ == "__main__":
    main()
