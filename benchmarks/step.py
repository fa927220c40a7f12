"""A training step of fastjepa beside one of benchmarks.baseline: python -m benchmarks.step [--models ...] [--output FOLDER]

Both contenders get the same weights, images and masks. Each runs in a process of its own, with its own memory, and they take
turns step by step. Masks are sampled outside of the clock. Both processes get the environment that `fastjepa/train.py` sets.
With ragged masks the baseline pads. Prints a table; --output also writes step_cpu.json (or step_cuda.json) into FOLDER.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from fastjepa import host, train  # noqa: F401  # train sets the environment that torch reads when it is imported
from fastjepa.config import MODEL_SIZES
from fastjepa.errors import FastjepaError
from fastjepa.run.folder import explain_write_errors

CONTENDERS = ("fastjepa", "baseline")


class Child:
    """A contender in its own process. It answers each line with a step's number by a line of JSON."""

    def __init__(self, contender: str, model: str, mode: str, args: argparse.Namespace) -> None:
        command = [sys.executable, "-m", "benchmarks.step", "--child", contender, "--models", model, "--modes", mode]
        command += [f"--{key}={getattr(args, key)}" for key in ("batch_size", "image_size", "precision", "threads")]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def step(self, number: int) -> dict[str, Any]:
        assert self._process.stdin
        assert self._process.stdout
        print(number, file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit(f"the process of a contender ended with status {self._process.wait()}; its error is above")
        result: dict[str, Any] = json.loads(answer)
        return result

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


def serve(contender: str, args: argparse.Namespace) -> None:
    """Run as a contender's process: read step numbers from stdin, take these steps, print their figures."""
    import torch
    from torch import Tensor

    from benchmarks.baseline import Baseline, BaselineIJEPA
    from fastjepa.config import Config, DataConfig, ModelConfig
    from fastjepa.config.batch_sizes import BatchSizes
    from fastjepa.engine.base import resolve_precision
    from fastjepa.engine.build import build_engine
    from fastjepa.objectives.ijepa.block_sizes import MaskConfig
    from fastjepa.objectives.ijepa.masks import MaskBatch, sample_masks
    from fastjepa.objectives.ijepa.objective import MaskedImages
    from fastjepa.objectives.ijepa.settings import IJEPAConfig
    from fastjepa.objectives.registry import build_objective, method_of
    from fastjepa.optim.schedule import Schedule, set_schedule
    from fastjepa.run.meter import peak_memory

    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch = args.batch_size
    config = Config(
        data=DataConfig(image_size=args.image_size),
        model=ModelConfig(name=args.models[0]),
        objective=IJEPAConfig(masks=MaskConfig(mode=args.modes[0])),
        global_batch_size=batch,
        precision=args.precision,
    )
    method = method_of(config)
    model = build_objective(method)
    if contender == "fastjepa":
        engine = build_engine(model, method, config, BatchSizes.share(config, 1), device, None)
        set_schedule(engine.param_groups, Schedule(config.optim, 1000, 300_000).at(0))

        def step(images: Tensor, masks: MaskBatch) -> Tensor:
            return engine.micro_step(MaskedImages(images, masks)).loss

    else:
        plain = BaselineIJEPA(config)
        plain.load_state_dict(model.state_dict())
        bf16 = resolve_precision(config, device) == torch.bfloat16
        step = Baseline(plain.to(device), config, bf16=bf16).step
    del model
    images = torch.randn(batch, 3, *config.data.image_hw, generator=torch.Generator().manual_seed(0)).to(device)
    for line in sys.stdin:
        indices = torch.arange(batch)
        masks = sample_masks(
            IJEPAConfig.of(config).masks, config.grid_h, config.grid_w, seed=0, step=int(line), sample_indices=indices
        )
        masks = masks.to(device)
        started = time.perf_counter()
        loss = step(images, masks)
        if device.type == "cuda":
            torch.cuda.synchronize()
        milliseconds = 1e3 * (time.perf_counter() - started)
        result = {"ms": milliseconds, "loss": loss.item(), "peak_gib": peak_memory(device) / host.GIB}
        print(json.dumps(result), flush=True)


def measure(model: str, mode: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time both contenders on one model and mode of masks: a row for each."""
    from fastjepa.profiling.timing import summary

    children = {name: Child(name, model, mode, args) for name in CONTENDERS}
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS}
    for number in range(args.warmup + args.steps):
        for name, child in children.items():
            results[name].append(child.step(number))
    for child in children.values():
        child.close()
    losses = {name: steps[0]["loss"] for name, steps in results.items()}
    bound = 1e-4 if args.precision == "fp32" else 1e-2
    if max(losses.values()) - min(losses.values()) > bound * losses["baseline"]:
        raise SystemExit(f"the losses of the first step differ by more than {bound:g} of the baseline's: {losses}")
    rows = []
    for name, steps in results.items():
        timing = summary([step["ms"] for step in steps[args.warmup :]])
        row = {"model": model, "masks": mode, "contender": name, "loss": losses[name]}
        rows.append(
            row | {"p20_ms": timing.p20, "p50_ms": timing.p50, "p80_ms": timing.p80, "peak_gib": steps[-1]["peak_gib"]}
        )
    for row in rows:
        baseline = rows[CONTENDERS.index("baseline")]
        row["time_ratio"] = row["p50_ms"] / baseline["p50_ms"]
        row["memory_ratio"] = row["peak_gib"] / baseline["peak_gib"]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models",
        nargs="+",
        default=["vit_tiny", "vit_small", "vit_base"],
        choices=MODEL_SIZES,
        help="default: %(default)s",
    )
    parser.add_argument(
        "--modes",
        nargs="+",
        default=["official", "ragged"],
        choices=["official", "ragged", "budget"],
        help="modes of the masks (default: %(default)s)",
    )
    parser.add_argument("--batch_size", type=int, default=16, help="images (default: %(default)s)")
    parser.add_argument("--image_size", type=int, default=224, help="pixels of a side (default: %(default)s)")
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="fp32", help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=2, help="threads of each process (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=1, help="untimed steps (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=7, help="timed steps, 2 or more (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="write step_cpu.json or step_cuda.json into this folder")
    parser.add_argument("--child", choices=CONTENDERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        serve(args.child, args)
        return
    for name, least in (("batch_size", 1), ("threads", 1), ("warmup", 0), ("steps", 2)):
        if getattr(args, name) < least:
            parser.error(f"--{name} {getattr(args, name)}: expected {least} or more")
    if args.output:
        try:  # before an hour of measuring, not after
            with explain_write_errors(f"--output {args.output}", "Choose another folder"):
                args.output.mkdir(parents=True, exist_ok=True)
        except FastjepaError as error:
            parser.error(str(error))
    import torch

    kind = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.cuda.get_device_name() if kind == "cuda" else host.cpu_name()
    print(
        f"batch {args.batch_size}, {args.image_size} x {args.image_size}, {args.precision}, {args.threads} threads, {device}"
    )
    print(f"{'model':<11}{'masks':<10}{'contender':<17}{'step ms':>9}{'p20-p80':>15}{'GiB':>7}{'time':>7}{'memory':>8}")
    arguments = {key: value for key, value in vars(args).items() if key not in ("output", "child")}
    environment = {"device": device, "torch": torch.__version__, **arguments}
    rows = []
    for model in args.models:
        for mode in args.modes:
            for row in measure(model, mode, args):
                spread = f"{row['p20_ms']:.0f}-{row['p80_ms']:.0f}"
                print(
                    f"{model:<11}{mode:<10}{row['contender']:<17}{row['p50_ms']:>9.0f}{spread:>15}{row['peak_gib']:>7.2f}"
                    f"{row['time_ratio']:>7.2f}{row['memory_ratio']:>8.2f}",
                    flush=True,
                )
                rows.append(row)
            if args.output:  # after each row, so that an interrupted run keeps its results
                path = args.output / f"step_{kind}.json"
                results = {"environment": environment, "results": rows}
                path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
