"""Growth of a step's time and memory: python -m benchmarks.scaling --output FOLDER [section.key=value ...] [--axes ...]

The axes are batch, resolution, model, number of target blocks, and ranks. Each starts from 4 images at 224 x 224,
vit_tiny, one thread per rank. Every point is measured in processes of its own, and stands beside the formulas of
fastjepa: time is the arithmetic of the tokens that were processed, at the rate of a matrix product (the median of
those measured along the axis); memory is state and activations.

The exponent of growth is the slope of a line through the logarithms: 1 where doubling x doubles the cost. Attention
grows with the square of the tokens of a sequence, so the exponent of resolution is above 1 by the formula too. FOLDER
gets scaling.csv and scaling.png.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import math
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.launch import launch
from fastjepa import distributed
from fastjepa.config import Config
from fastjepa.config.batch_sizes import BatchSizes
from fastjepa.engine.base import resolve_precision
from fastjepa.engine.build import build_engine
from fastjepa.engine.slices import slice_size
from fastjepa.errors import FastjepaError
from fastjepa.host import MIB
from fastjepa.objectives.registry import build_objective, load_config, method_of
from fastjepa.plan import zero
from fastjepa.profiling import Steps, profile_steps, synthetic_batches
from fastjepa.run.folder import explain_write_errors

BASE = ("model.name=vit_tiny", "global_batch_size=4", "data.image_size=224", "masks.mode=ragged")
AXES: dict[str, tuple[str, tuple[str | int, ...], str]] = {
    "batch": ("global_batch_size", (1, 2, 4, 8, 16), "images of a step"),
    "resolution": ("data.image_size", (112, 224, 448), "patches of an image"),
    "model": ("model.name", ("vit_tiny", "vit_small", "vit_base"), "trained parameters"),
    "target blocks": ("masks.num_target_blocks", (1, 2, 4, 8), "target blocks"),
    "ranks": ("", (1, 2), "ranks that share the images of a step"),
}
"""Axis -> the setting that varies, its values, and the name of x, the number that growth is measured against."""


@dataclass(frozen=True)
class Point:
    """One measured configuration: milliseconds and bytes of one rank."""

    axis: str
    value: str
    x: float
    step_ms_p20: float
    step_ms: float
    step_ms_p80: float
    teraflop: float
    """Arithmetic of a step, by formula."""
    ceiling_teraflops: float
    """TFLOP/s of a matrix product, measured in the same process."""
    memory: float
    """Bytes of tensors: state and activations."""
    formula_memory: float
    formula_ms: float = 0.0
    """The arithmetic at the median ceiling of the axis. Only matrix products and attention are counted."""


def x_of(axis: str, value: str | int, config: Config) -> float:
    """The number that growth along the axis is measured against."""
    if axis == "resolution":
        return config.num_patches
    return zero.parameters_of(config).trained if axis == "model" else float(value)


def config_of(axis: str, index: int, overrides: Sequence[str]) -> Config:
    """The configuration of a point.

    Raises:
        ConfigError: the overrides do not make a valid configuration.
    """
    setting, values, _ = AXES[axis]
    config = load_config(None, [*BASE, *overrides, *([f"{setting}={values[index]}"] if setting else [])])
    BatchSizes.share(config, 1 if setting else int(values[index]))
    return config


def run_rank(axis: str, index: int, overrides: Sequence[str], steps: int, result: Path) -> None:
    """Measure a point as one rank. The first rank writes it to the file `result`."""
    config, value = config_of(axis, index, overrides), AXES[axis][1][index]
    device = distributed.init()
    world = distributed.world_size()
    sizes = BatchSizes.share(config, world)
    method = method_of(config)
    engine = build_engine(build_objective(method), method, config, sizes, device, None)
    counts = Steps(warmup=1, timed=steps, traced=1)
    batches = synthetic_batches(method, sizes, device, counts.total)
    found = profile_steps(engine, method, sizes, batches, result.parent, counts)
    bf16 = resolve_precision(config, device) == torch.bfloat16
    tokens = type(method.typical_tokens()[0])(**found.tokens)
    per_image = method.activation_bytes(tokens, bf16=bf16, autocast=bf16)
    activations = per_image * (slice_size(sizes.micro, per_image) if device.type == "cpu" else sizes.micro)
    point = Point(
        axis=axis,
        value=str(value),
        x=x_of(axis, value, config),
        step_ms_p20=found.step_ms.p20,
        step_ms=found.step_ms.p50,
        step_ms_p80=found.step_ms.p80,
        teraflop=found.teraflop_per_step,
        ceiling_teraflops=found.ceilings.teraflops,
        memory=found.memory.state + found.memory.activations,
        formula_memory=zero.state_bytes(config, "torch", world, bf16=bf16).resident + activations,
    )
    if distributed.rank() == 0:
        result.write_text(json.dumps(asdict(point)), encoding="utf-8")
    distributed.raise_together(None)
    distributed.finish()


def measure(axis: str, overrides: Sequence[str], steps: int) -> list[Point]:
    """Measure every point of an axis, each in processes of its own."""
    points = []
    for index, value in enumerate(AXES[axis][1]):
        with tempfile.TemporaryDirectory() as folder:
            result = Path(folder) / "point.json"
            arguments = [*overrides, "--steps", str(steps), "--point", axis, str(index), "--result", str(result)]
            ranks = int(value) if axis == "ranks" else 1
            launch("benchmarks.scaling", ranks, *arguments, timeout=3600, cuda=torch.cuda.is_available())
            points.append(Point(**json.loads(result.read_text(encoding="utf-8"))))
    ceiling = statistics.median(point.ceiling_teraflops for point in points)
    return [dataclasses.replace(point, formula_ms=1e3 * point.teraflop / ceiling) for point in points]


def exponent(xs: Sequence[float], ys: Sequence[float]) -> float:
    """The exponent of y ~ x^exponent: the slope of the least-squares line through the logarithms."""
    slope, _ = statistics.linear_regression([math.log(x) for x in xs], [math.log(y) for y in ys])
    return slope


def exponents(points: Sequence[Point]) -> dict[str, float]:
    """Exponents of the measured and the formula's time and memory."""
    xs = [point.x for point in points]
    return {
        key: exponent(xs, [getattr(point, key) for point in points])
        for key in ("step_ms", "formula_ms", "memory", "formula_memory")
    }


def plot(measured: dict[str, list[Point]], path: Path) -> None:
    """Draw a column for each axis: above, the time of a step with its 20th to 80th percentile; below, memory."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogFormatter, NullLocator, StrMethodFormatter

    figure, axes = plt.subplots(
        2, len(measured), figsize=(3.5 * len(measured), 6.4), squeeze=False, layout="constrained"
    )
    rows = (("step_ms", "formula_ms", "ms", 1.0), ("memory", "formula_memory", "MiB", float(MIB)))
    for column, (name, points) in enumerate(measured.items()):
        slopes, xs = exponents(points), [point.x for point in points]
        for row, (key, formula, unit, scale) in enumerate(rows):
            axis = axes[row][column]
            axis.plot(xs, [getattr(p, key) / scale for p in points], "o-", color="#1b6ca8", label="measured")
            axis.plot(xs, [getattr(p, formula) / scale for p in points], "s--", color="#d98e04", label="formula")
            if row == 0:
                axis.vlines(xs, [p.step_ms_p20 for p in points], [p.step_ms_p80 for p in points], color="#1b6ca8")
            axis.set_xscale("log")
            axis.set_yscale("log")
            axis.set_xticks(xs, [p.value.removeprefix("vit_") for p in points])
            axis.xaxis.set_minor_locator(NullLocator())
            axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axis.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(1.5, 0.4)))
            axis.set_title(
                f"{name}, {unit}\ngrows as x^{slopes[key]:.2f}, formula x^{slopes[formula]:.2f}",
                fontsize=10,
                loc="left",
            )
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
        axes[1][column].set_xlabel(f"x: {AXES[name][2]}", fontsize=9)
    axes[0][0].legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="settings that replace those of the base"
    )
    parser.add_argument("--output", type=Path, help="folder for scaling.csv and scaling.png")
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES), help="axes to measure (default: all)")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of a point, 2 or more (default: %(default)s)")
    parser.add_argument("--point", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_intermixed_args(argv)
    if args.steps < 2:
        parser.error(f"--steps {args.steps}: expected 2 or more, for a median")
    if args.point:
        run_rank(args.point[0], int(args.point[1]), args.overrides, args.steps, args.result)
        return
    try:  # before minutes of measuring, not after
        for axis in args.axes:
            for index in range(len(AXES[axis][1])):
                config_of(axis, index, args.overrides)
        if args.output:
            with explain_write_errors(f"--output {args.output}", "Choose another folder"):
                args.output.mkdir(parents=True, exist_ok=True)
    except FastjepaError as error:
        parser.error(str(error))
    print(f"{'axis':<16}{'value':>10}{'step ms':>12}{'formula':>12}{'MiB':>10}{'formula':>10}")
    measured: dict[str, list[Point]] = {}
    for axis in args.axes:
        measured[axis] = measure(axis, args.overrides, args.steps)
        for p in measured[axis]:
            print(
                f"{axis:<16}{p.value:>10}{p.step_ms:>12,.1f}{p.formula_ms:>12,.1f}{p.memory / MIB:>10,.1f}"
                f"{p.formula_memory / MIB:>10,.1f}"
            )
        slopes = exponents(measured[axis])
        print(
            f"{'':<16}{'x^':>10}{slopes['step_ms']:>12.2f}{slopes['formula_ms']:>12.2f}{slopes['memory']:>10.2f}"
            f"{slopes['formula_memory']:>10.2f}   x: {AXES[axis][2]}",
            flush=True,
        )
    if args.output:
        records: list[dict[str, Any]] = [asdict(point) for points in measured.values() for point in points]
        with (args.output / "scaling.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, records[0])
            writer.writeheader()
            writer.writerows(records)
        plot(measured, args.output / "scaling.png")


if __name__ == "__main__":
    main()
