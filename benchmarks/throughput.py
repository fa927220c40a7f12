"""Throughput of a configuration on this machine, and where a step's time goes.

python -m benchmarks.throughput [--config configs/RUN.yaml] [section.key=value ...] [--output FOLDER]

One process trains a few steps with plain PyTorch: on the images of data.source, on synthetic images, and on synthetic images
in micro batches of 1, 2, 4, ... until two doublings in a row gain less than 5 % or memory runs out. The figures are printed;
FOLDER gets them as JSON, CSV, a Chrome trace and one page, report.html. `fastjepa/train.py --profile` gives the same figures
of a run on several GPUs.
"""

from __future__ import annotations

import fastjepa.train  # noqa: F401  # first: it sets the environment that torch reads when it is imported

# isort: split
import argparse
import dataclasses
import gc
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from fastjepa import distributed
from fastjepa.config import Config
from fastjepa.config.batch_sizes import BatchSizes
from fastjepa.config.shipped import DEFAULT_CONFIG, find_config
from fastjepa.data import ImageDataset, Loader, open_dataset, steps_per_epoch
from fastjepa.engine.base import resolve_precision
from fastjepa.engine.build import build_engine
from fastjepa.errors import ConfigError, FastjepaError
from fastjepa.host import GIB, MIB, free_memory
from fastjepa.objectives.registry import build_objective, load_config, method_of
from fastjepa.profiling import (
    Ceilings,
    MicroBatch,
    StepProfile,
    Steps,
    measure_ceilings,
    profile_steps,
    synthetic_batches,
)
from fastjepa.profiling.output import write_report
from fastjepa.profiling.report import Report, figures, format_profile
from fastjepa.profiling.timing import NOISE
from fastjepa.run.folder import explain_write_errors

GAIN = 1 + NOISE
"""A larger micro batch counts as a gain if its images/s exceed all before it by this factor."""
LARGEST = 4096
"""Images of the largest micro batch that is tried."""


def measure(
    config: Config,
    device: torch.device,
    ceilings: Ceilings,
    steps: Steps,
    folder: Path,
    batches: Callable[[BatchSizes], Iterable[MicroBatch]] | None = None,
) -> StepProfile:
    """Profile a fresh model on `batches` (None: on synthetic images). Its memory is freed at the end."""
    sizes = BatchSizes.share(config, 1)
    method = method_of(config)
    engine = build_engine(build_objective(method), method, config, sizes, device, None)
    source = batches(sizes) if batches else synthetic_batches(method, sizes, device, steps.total)
    try:
        return profile_steps(engine, method, sizes, source, folder, steps, ceilings)
    finally:
        engine.close()
        del engine
        gc.collect()
        torch.cuda.empty_cache()  # does nothing where there is no GPU


def on_real_images(
    dataset: ImageDataset, config: Config, device: torch.device, ceilings: Ceilings, steps: Steps, folder: Path
) -> StepProfile:
    """Profile a fresh model on the images of a data set."""
    loaders: list[Loader] = []

    def load(sizes: BatchSizes) -> Loader:
        loader = Loader(
            dataset,
            config,
            method_of(config),
            rank=0,
            world_size=1,
            micro_batch_size=sizes.micro,
            grad_accum_steps=sizes.accum,
            steps_per_epoch=steps_per_epoch(len(dataset), config.global_batch_size),
            start_step=0,
            total_steps=steps.total,
            device=device,
        )
        loaders.append(loader)
        return loader

    try:
        return measure(config, device, ceilings, steps, folder, load)
    finally:
        for loader in loaders:
            loader.close()


def sweep(
    config: Config, device: torch.device, ceilings: Ceilings, steps: Steps, folder: Path
) -> tuple[list[StepProfile], str]:
    """Profile micro batches of 1, 2, 4, ... images.

    Returns:
        The profiles, and a sentence that says why no larger micro batch was tried.
    """
    points: list[StepProfile] = []
    best, in_vain, size = 0.0, 0, 1
    while size <= LARGEST:
        if device.type == "cpu" and points:
            # Linux would kill the process rather than refuse the memory.
            needed = 2 * points[-1].memory.activations
            if needed > 0.8 * (free := free_memory()):
                return points, f"{size} images would take {needed / GIB:.1f} GiB, {free / GIB:.1f} are free."
        alone = dataclasses.replace(config, global_batch_size=size, micro_batch_size=None)
        try:
            point = measure(alone, device, ceilings, steps, folder)
        except torch.OutOfMemoryError:
            return points, f"{size} images do not fit into the memory."
        points.append(point)
        print_row("sweep", point)
        in_vain = 0 if point.images_per_second > GAIN * best else in_vain + 1
        best = max(best, point.images_per_second)
        if in_vain == 2:  # one may be noise
            return points, f"The last two doublings, up to {size} images, gained less than {GAIN - 1:.0%}."
        size *= 2
    return points, f"Micro batches above {LARGEST} images are not tried."


HEADER = (
    f"{'':<10}{'micro batch':>12}{'step ms':>12}{'p20-p80':>18}{'images/s':>11}{'tokens/s':>11}{'MFU':>8}"
    f"{'matmuls':>9}{'wait':>7}{'MiB':>9}"
)


def print_row(title: str, profile: StepProfile) -> None:
    row = figures(profile)
    spread = f"{row['step_ms_p20']:.1f}-{row['step_ms_p80']:.1f}"
    used = (row["state_bytes"] + row["activation_bytes"]) / MIB
    print(
        f"{title:<10}{row['micro_batch_size']:>12,}{row['step_ms_p50']:>12,.1f}{spread:>18}{row['images_per_second']:>11,.2f}"
        f"{row['tokens_per_second']:>11,.0f}{row['mfu']:>8.1%}{row['matmul_share']:>9.0%}{row['data_wait']:>7.1%}"
        f"{used:>9,.0f}",
        flush=True,
    )


def run(args: argparse.Namespace) -> None:
    config = load_config(DEFAULT_CONFIG if args.config is None else find_config(args.config), args.overrides)
    steps = Steps(args.warmup, args.steps, args.traced)
    device = distributed.init()
    BatchSizes.share(config, 1)  # finds a mistake in the configuration before anything is measured
    dataset = open_dataset(config.data, "train")
    assert dataset is not None
    with explain_write_errors(f"--output {args.output}", "Choose another folder"):
        args.output.mkdir(parents=True, exist_ok=True)
    ceilings = measure_ceilings(device, resolve_precision(config, device))
    with tempfile.TemporaryDirectory() as scratch:
        print(HEADER)
        try:
            real = on_real_images(dataset, config, device, ceilings, steps, args.output)
        except torch.OutOfMemoryError as error:
            micro = BatchSizes.share(config, 1).micro
            raise ConfigError(
                f"micro_batch_size = {config.micro_batch_size}: {micro} images do not fit into the GPU's memory; expected a "
                "smaller one (fastjepa doctor suggests one that fits)"
            ) from error
        print_row("run", real)
        synthetic = measure(config, device, ceilings, steps, Path(scratch))
        print_row("synthetic", synthetic)
        points: list[StepProfile] = []
        end = ""
        if args.sweep:
            few = Steps(warmup=min(2, args.warmup), timed=max(2, args.steps // 2), traced=1)
            points, end = sweep(config, device, ceilings, few, Path(scratch))
    command = f"python -m benchmarks.throughput {shlex.join(args.arguments)}".strip()
    report = Report(command, config, real, synthetic, tuple(points), end)
    write_report(report, args.output)
    print("\n" + format_profile(real))
    if report.knee:
        print(f"\nmicro batch: the knee is at {report.knee.micro_batch_size}. {end}")
    print(f"\n{args.output / 'report.html'}")


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.throughput",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings as for fastjepa/train.py")
    parser.add_argument("--config", help="YAML file of a run (default: configs/default.yaml)")
    parser.add_argument("--output", type=Path, default=Path("runs/throughput"), help="folder (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=5, help="untimed steps at the beginning (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="timed steps, 2 or more (default: %(default)s)")
    parser.add_argument("--traced", type=int, default=3, help="steps under the profiler (default: %(default)s)")
    parser.add_argument(
        "--no_sweep", dest="sweep", action="store_false", help="measure only the micro batch of the configuration"
    )
    args = parser.parse_intermixed_args(argv)
    args.arguments = list(argv)
    for name, least in (("warmup", 0), ("steps", 2), ("traced", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name} {getattr(args, name)}: expected {least} or more")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(sys.argv[1:] if argv is None else argv)
    try:
        run(args)
    except FastjepaError as error:
        print(f"fastjepa: error: {error}", file=sys.stderr)
        return error.exit_status
    finally:
        distributed.finish()
    return 0


if __name__ == "__main__":
    sys.exit(main())
