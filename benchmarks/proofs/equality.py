"""Compare every engine with a plain trajectory: python -m benchmarks.proofs.equality --output benchmarks/results [--reduced]

A cell of the matrix is one training of 100 steps: plain torch or ZeRO 0 to 3, fp32 or bf16, 1, 2 or 4 ranks, 1 or 4
micro batches, with and without clipping, with and without activation checkpointing. Its last weights and EMA are
compared with those of `plain_trajectory`: one process, whole batches, fp32, torch.optim.AdamW, a loop for the EMA.
Two more checks follow every step, on every rank. The model's weights must equal the fp32 state rounded to the model's
precision, bit for bit (the target encoder's: bf16(EMA)). And the EMA must be the average of the run's own fp32
weights, kept here in float64, to 1e-6.

The bound at fp32 is 1e-5 of each parameter's norm. The bound at bf16 is derived. A rounding to bf16 changes a value
by at most u = 2^-9 of it. A gradient passes ROUNDINGS roundings; as independent errors they add up to sqrt(ROUNDINGS)
u of its norm. AdamW's update m / (sqrt(v) + eps) has that error in m and, at most, in sqrt(v): twice as much in the
quotient. Weights add up such updates, so their error is at most that share of their path, the sum of the norms of
their updates:

    |w - w_reference| <= 2 sqrt(ROUNDINGS) u path

The error of the EMA, an average of weights, cannot be larger. The bound is of first order: it assumes that the
gradients of the two trajectories differ by rounding only. So the measured errors stand beside it.
"""

from __future__ import annotations

import argparse
import csv
import gc
import itertools
import json
import math
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.launch import launch
from fastjepa import distributed
from fastjepa.config import Config, DataConfig, ModelConfig, OptimConfig
from fastjepa.config.batch_sizes import BatchSizes
from fastjepa.engine.base import Engine
from fastjepa.engine.build import build_engine
from fastjepa.objectives.ijepa.block_sizes import MaskConfig
from fastjepa.objectives.ijepa.masks import sample_masks
from fastjepa.objectives.ijepa.objective import IJEPAObjective, MaskedImages
from fastjepa.objectives.ijepa.settings import IJEPAConfig
from fastjepa.objectives.registry import build_objective, method_of
from fastjepa.optim.schedule import Schedule, set_schedule

STEPS = 100
REDUCED_STEPS = 20
GLOBAL_BATCH = 16  # 4 ranks x 4 micro batches
CLIP_GRAD = 0.05
# Adam divides a gradient by its own size, even if it is rounding noise. At the usual 1e-8, elements whose exact
# gradient is zero (the bias of the keys, which adds the same to all scores of a query) take full steps in a random
# direction, and fp32 trajectories are 1e-3 apart after 100 steps. At this eps, a hundredth of a usual gradient, they
# are 4e-7 apart. It also makes the scale of the gradient matter, which Adam cancels otherwise.
EPS = 1e-4
FP32_BOUND = 1e-5
EMA_BOUND = 1e-6

# Roundings from the pixels to a weight's gradient: in each of 2 + 2 blocks 12 roundings forward (norm, qkv, scores,
# weights, sum over values, projection, residual, norm, fc1, gelu, fc2, residual) and as many backward; 12 in each of
# the target encoder's 2 blocks; 8 at the embeddings, the final norms and the predictor's projections, forward and
# backward.
ROUNDINGS = 4 * 24 + 2 * 12 + 2 * 8
ENGINES = ("torch", "zero0", "zero1", "zero2", "zero3")

Fault = Literal[
    "EMA before the step",
    "EMA momentum of the next step",
    "EMA rounded to bf16",
    "gradients of one rank only",
    "gradients summed over 2 ranks",
    "accumulation without dividing",
    "every micro batch clipped by itself",
]


def trajectory_config(*, clip_grad: float | None = None, micro: int | None = None, **changes: Any) -> Config:
    """A model of width 24 on a 6 x 8 grid, with a different number for every dimension, and 4 images per step."""
    config = Config(
        data=DataConfig(image_size=(24, 32), in_channels=2, mean=(0.5, 0.5), std=(0.25, 0.25)),
        model=ModelConfig(patch_size=4, embed_dim=24, depth=2, num_heads=3, init="fan_in"),
        objective=IJEPAConfig(predictor_embed_dim=12, predictor_depth=2, masks=MaskConfig(min_keep=2)),
        optim=OptimConfig(warmup_epochs=1, lr=3e-3, eps=EPS, ema_momentum=(0.9, 1.0), clip_grad=clip_grad),
        global_batch_size=4,
        micro_batch_size=micro,
        epochs=1,
        precision="fp32",
    )
    return replace(config, **changes)


def schedule(config: Config) -> Schedule:
    return Schedule(config.optim, steps_per_epoch=10, total_steps=STEPS)


def batch(config: Config, step: int, rows: Iterable[int] | None = None) -> MaskedImages:
    """Images and masks of a step, for the given rows of the global batch (None: all)."""
    generator = torch.Generator().manual_seed(step)
    height, width = config.data.image_hw
    images = torch.randn(config.global_batch_size, config.data.in_channels, height, width, generator=generator)
    chosen = torch.arange(config.global_batch_size) if rows is None else torch.tensor(list(rows))
    indices = chosen + step * config.global_batch_size
    settings = IJEPAConfig.of(config).masks
    masks = sample_masks(settings, config.grid_h, config.grid_w, seed=1, step=step, sample_indices=indices)
    return MaskedImages(images[chosen], masks)


@dataclass(frozen=True)
class Trajectory:
    state: dict[str, Tensor]
    """The last weights; the EMA stands under the target encoder's names."""
    path: dict[str, float]
    """The sum of the norms of the updates, for each weight."""


def plain_trajectory(config: Config, steps: int = STEPS, fault: Fault | None = None) -> Trajectory:
    """Train with torch.optim.AdamW and a loop for the EMA, in one process, on whole batches, in fp32.

    A `fault` plants a mistake, which shows whether the comparison would find it.
    """
    model = build_objective(method_of(config))
    assert isinstance(model, IJEPAObjective)
    model.target_encoder.requires_grad_(False)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    decayed = [p for p in trained.values() if p.ndim > 1]
    others = [p for p in trained.values() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed}, {"params": others}], betas=config.optim.betas, eps=config.optim.eps
    )
    averaged = list(zip(model.target_encoder.parameters(), model.context_encoder.parameters(), strict=True))
    path = dict.fromkeys(trained, 0.0)

    def clip() -> None:
        if config.optim.clip_grad:
            torch.nn.utils.clip_grad_norm_(trained.values(), config.optim.clip_grad)

    @torch.no_grad()
    def move_average(momentum: float) -> None:
        for average, weight in averaged:
            average.copy_(momentum * average + (1 - momentum) * weight)
            if fault == "EMA rounded to bf16":
                average.copy_(average.bfloat16())

    for step in range(steps):
        values = schedule(config).at(step)
        momentum = values["ema_momentum"]
        if fault == "EMA momentum of the next step":
            momentum = schedule(config).at(step + 1)["ema_momentum"]
        for group, decay in zip(optimizer.param_groups, (values["weight_decay"], 0.0), strict=True):
            group["lr"], group["weight_decay"] = values["lr"], decay
        rows = range(config.global_batch_size)
        if fault == "gradients of one rank only":
            rows = range(config.global_batch_size // 2)
        if fault == "every micro batch clipped by itself":
            total = [torch.zeros_like(p) for p in trained.values()]
            for micro in range(4):
                size = config.global_batch_size // 4
                model(batch(config, step, range(micro * size, (micro + 1) * size))).loss.backward()
                clip()
                for sum_, p in zip(total, trained.values(), strict=True):
                    assert p.grad is not None
                    sum_ += p.grad / 4
                optimizer.zero_grad()
            for sum_, p in zip(total, trained.values(), strict=True):
                p.grad = sum_
        else:
            loss = model(batch(config, step, rows)).loss
            factor = {"gradients summed over 2 ranks": 2, "accumulation without dividing": 4}.get(fault or "", 1)
            (loss * factor).backward()
            clip()
        if fault == "EMA before the step":
            move_average(momentum)
        before = {n: p.detach().clone() for n, p in trained.items()}
        optimizer.step()
        optimizer.zero_grad()
        for n, p in trained.items():
            path[n] += (p.detach() - before[n]).norm().item()
        if fault != "EMA before the step":
            move_average(momentum)
    return Trajectory({name: p.detach() for name, p in model.named_parameters()}, path)


def relative_errors(mine: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """The norm of the difference over the norm of the expected value, for each parameter."""
    assert mine.keys() == expected.keys()
    return {name: ((mine[name] - x).norm() / x.norm()).item() for name, x in expected.items()}


def allowed(cell: Cell, reference: Trajectory) -> dict[str, float]:
    """The largest relative error allowed for each parameter, as derived at the top of this file."""
    if cell.precision == "fp32":
        return dict.fromkeys(reference.state, FP32_BOUND)
    bounds = {}
    tokens = batch(cell.config(), 0).masks.predictor_lengths.total // (cell.world * cell.accum)
    for name, x in reference.state.items():
        # Where weights are bf16, PyTorch's LayerNorm on the CPU sums their gradient over the tokens in bf16, with one
        # rounding per token (a sum of ones stops at 256).
        in_bf16 = "norm" in name and cell.engine in ("zero1", "zero2", "zero3")
        share = 2 * math.sqrt(ROUNDINGS + (tokens if in_bf16 else 0)) * 2.0**-9
        bounds[name] = share * reference.path[name.replace("target_encoder", "context_encoder")] / x.norm().item()
    return bounds


def engine_steps(
    engine: Engine, config: Config, sizes: BatchSizes, rank: int, world: int, first: int, last: int
) -> None:
    """Take the steps `first` to `last` - 1 of the trajectory, their batches divided into micro batches and among ranks."""
    for step in range(first, last):
        set_schedule(engine.param_groups, schedule(config).at(step))
        for micro in range(sizes.accum):
            start = (micro * world + rank) * sizes.micro
            micro_batch = batch(config, step, range(start, start + sizes.micro))
            engine.micro_step(micro_batch.to(engine.device))


def full_state(engine: Engine) -> dict[str, Tensor]:
    """The fp32 weights (for the target encoder: the EMA), assembled from the pieces of all ranks on every rank's CPU."""
    shapes = engine.shapes()
    flat = torch.zeros(sum(math.prod(shape) for shape in shapes.values()), device=engine.device)
    state = dict(zip(shapes, flat.split([math.prod(shape) for shape in shapes.values()]), strict=True))
    for piece in engine.pieces():
        if piece.written:
            state[piece.name][piece.start : piece.start + piece.numel] = piece.view(piece.tensor)
    if distributed.world_size() > 1:
        dist.all_reduce(flat)  # every element is 0 on all ranks but one
    return {name: x.view(shapes[name]).cpu() for name, x in state.items()}


def wrong_weights(engine: Engine, state: dict[str, Tensor]) -> int:
    """Count the model's parameters on this rank that differ in any bit from `state` in the model's precision.

    Of a parameter that stage 3 shards, this rank's share is compared, and the whole where it is gathered at the moment.
    """
    wrong, rank = 0, distributed.rank()
    for name, param in engine.model.named_parameters():
        expected = state[name].to(param.device, param.dtype).flatten()
        same = True
        if hasattr(param, "ds_tensor"):
            share = param.ds_tensor.numel()
            mine = expected[rank * share : (rank + 1) * share]
            same = torch.equal(param.ds_tensor[: mine.numel()], mine)
        if not hasattr(param, "ds_tensor") or param.numel() == expected.numel():
            same = same and torch.equal(param.detach().flatten(), expected)
        wrong += not same
    return wrong


class OwnAverage:
    """The EMA of an engine's own fp32 weights, in float64."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self._average = {n: x.double() for n, x in state.items() if n.startswith("target_encoder.")}

    def error_after(self, state: dict[str, Tensor], momentum: float) -> float:
        """Update the average with the weights of `state`; return the largest relative error of a parameter's EMA in it."""
        for name, average in self._average.items():
            weight = state[name.replace("target_encoder", "context_encoder")]
            average.mul_(momentum).add_(weight.double(), alpha=1 - momentum)
        errors = relative_errors({name: state[name].double() for name in self._average}, self._average)
        return max(errors.values())


@dataclass(frozen=True)
class Cell:
    """One training of the matrix."""

    engine: str
    precision: Literal["fp32", "bf16"]
    world: int
    accum: int
    clip: bool
    checkpointing: bool

    def config(self) -> Config:
        config = trajectory_config(
            clip_grad=CLIP_GRAD if self.clip else None,
            global_batch_size=GLOBAL_BATCH,
            micro=GLOBAL_BATCH // (self.world * self.accum),
            precision=self.precision,
        )
        return replace(config, model=replace(config.model, activation_checkpointing=self.checkpointing))


def all_cells() -> list[Cell]:
    off_on = (False, True)
    return list(
        itertools.starmap(Cell, itertools.product(ENGINES, ("fp32", "bf16"), (1, 2, 4), (1, 4), off_on, off_on))
    )


def reduced_cells() -> list[Cell]:
    """Three cells of every engine, which together have every value of every dimension."""
    return [
        cell
        for engine in ENGINES
        for cell in (
            Cell(engine, "fp32", world=1, accum=4, clip=True, checkpointing=True),
            Cell(engine, "bf16", world=2, accum=1, clip=True, checkpointing=False),
            Cell(engine, "fp32", world=4, accum=1, clip=False, checkpointing=True),
        )
    ]


@dataclass(frozen=True)
class Row:
    """The outcome of a cell. Errors are relative errors, by norm, of the worst parameter."""

    cell: Cell
    weight_error: float
    ema_error: float
    of_bound: float
    """The largest error as a share of what is allowed for that parameter."""
    own_ema_error: float
    """Error of the EMA against the float64 average of the run's own weights, the largest over all steps and ranks."""
    wrong_weights: int
    """Number of parameters that differed from the rounded fp32 state, summed over steps and ranks."""
    seconds: float

    @property
    def holds(self) -> bool:
        return self.of_bound <= 1 and self.own_ema_error <= EMA_BOUND and self.wrong_weights == 0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self.cell) | {f.name: getattr(self, f.name) for f in fields(self) if f.name != "cell"}


def run_cell(cell: Cell, reference: Trajectory, steps: int, folder: Path) -> Row:
    """Train a cell as one of its ranks. Every rank gets the row."""
    started = time.perf_counter()
    config = cell.config()
    rank, world = distributed.rank(), distributed.world_size()
    sizes = BatchSizes.share(config, world)
    ds_config = None
    if cell.engine != "torch":
        ds_config = folder / f"{cell.engine}.rank{rank}.json"
        stage = int(cell.engine.removeprefix("zero"))
        ds_config.write_text(json.dumps({"zero_optimization": {"stage": stage}, "steps_per_print": 10**9}))
    method = method_of(config)
    engine = build_engine(build_objective(method), method, config, sizes, torch.device("cpu"), ds_config)
    state = full_state(engine)
    average, own_error, wrong = OwnAverage(state), 0.0, 0
    for step in range(steps):
        engine_steps(engine, config, sizes, rank, world, step, step + 1)
        state = full_state(engine)
        own_error = max(own_error, average.error_after(state, schedule(config).at(step)["ema_momentum"]))
        wrong += wrong_weights(engine, state)
    errors, bounds = relative_errors(state, reference.state), allowed(cell, reference)
    ranks = distributed.gather_objects((own_error, wrong))
    engine.close()
    return Row(
        cell,
        max(error for name, error in errors.items() if not name.startswith("target_encoder")),
        max(error for name, error in errors.items() if name.startswith("target_encoder")),
        max(error / bounds[name] for name, error in errors.items()),
        max(own for own, _ in ranks),
        sum(wrong for _, wrong in ranks),
        time.perf_counter() - started,
    )


def run_rank(folder: Path) -> None:
    """Run the cells of this world size as one rank, one after the other. The first rank writes the rows."""
    torch.set_num_threads(1)
    distributed.init()
    steps, cells = _read(folder)
    mine = [cell for cell in cells if cell.world == distributed.world_size()]
    references = {
        clip: plain_trajectory(replace(mine[0], clip=clip, precision="fp32").config(), steps)
        for clip in sorted({cell.clip for cell in mine})
    }
    for cell in mine:
        row = run_cell(cell, references[cell.clip], steps, folder)
        gc.collect()
        if distributed.rank() == 0:
            with (folder / "rows.jsonl").open("a") as file:
                file.write(json.dumps(row.as_dict()) + "\n")
    distributed.finish()


def _read(folder: Path) -> tuple[int, list[Cell]]:
    wanted = json.loads((folder / "wanted.json").read_text())
    return wanted["steps"], [Cell(**cell) for cell in wanted["cells"]]


def run(cells: list[Cell], steps: int, folder: Path) -> list[Row]:
    """Run all cells, in one launch per world size (start-up takes seconds), side by side, with files in `folder`."""
    (folder / "wanted.json").write_text(json.dumps({"steps": steps, "cells": [asdict(cell) for cell in cells]}))
    worlds = sorted({cell.world for cell in cells})
    with ThreadPoolExecutor(len(worlds)) as pool:
        launches = [
            pool.submit(launch, "benchmarks.proofs.equality", world, "--rank-in", str(folder), timeout=4 * 3600)
            for world in worlds
        ]
    for each in launches:
        each.result()
    names = [f.name for f in fields(Cell)]
    rows = []
    for line in (folder / "rows.jsonl").read_text().splitlines():
        values = json.loads(line)
        rows.append(Row(Cell(**{name: values.pop(name) for name in names}), **values))
    return sorted(rows, key=lambda row: cells.index(row.cell))


def as_markdown(rows: list[Row], steps: int) -> str:
    """Summarise the rows in Markdown: the worst of each engine and precision, then the errors of planted mistakes."""
    lines = [
        f"# Equality: {sum(row.holds for row in rows)} of {len(rows)} cells hold",
        "",
        f"Relative errors after {steps} steps, by norm, of the worst parameter of the worst cell. `of bound`: the error as",
        "a share of what is allowed. `own EMA`: the error of the EMA against a float64 average of the run's own weights, at",
        "the worst step. `wrong weights`: parameters that differed from the rounded fp32 state, over all steps and ranks.",
        "",
        "| engine | precision | cells | weights | EMA | of bound | own EMA | wrong weights |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for engine, precision in itertools.product(ENGINES, ("fp32", "bf16")):
        some = [row for row in rows if (row.cell.engine, row.cell.precision) == (engine, precision)]
        if some:
            errors = [
                max(getattr(r, k) for r in some) for k in ("weight_error", "ema_error", "of_bound", "own_ema_error")
            ]
            lines.append(
                f"| {engine} | {precision} | {len(some)} | {' | '.join(f'{x:.1e}' for x in errors)} | "
                f"{sum(r.wrong_weights for r in some)} |"
            )
    lines += [
        "",
        "Mistakes planted in the plain trajectory, compared with it in the same way. One that stays below 1 of the bf16",
        "bound shows in `own EMA` if it concerns the EMA, and else at fp32 only:",
        "",
        f"| mistake | error (allowed at fp32: {FP32_BOUND:g}) | of the bf16 bound |",
        "|---|---|---|",
    ]
    for fault in get_args(Fault):
        error, share = fault_error(fault, steps)
        lines.append(f"| {fault} | {error:.1e} | {share:.2f} |")
    return "\n".join(lines) + "\n"


def fault_error(fault: Fault, steps: int) -> tuple[float, float]:
    """The error that a mistake causes in a plain trajectory.

    Returns:
        The largest relative error of a parameter, and the largest error as a share of what is allowed at bf16.
    """
    cell = Cell("torch", "bf16", 1, 4, fault == "every micro batch clipped by itself", False)
    config = replace(cell, precision="fp32").config()
    right, wrong = plain_trajectory(config, steps), plain_trajectory(config, steps, fault)
    errors, bounds = relative_errors(wrong.state, right.state), allowed(cell, right)
    return max(errors.values()), max(error / bounds[name] for name, error in errors.items())


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.proofs.equality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, help="folder for equality.csv and equality.md")
    parser.add_argument("--reduced", action="store_true", help=f"15 cells of {REDUCED_STEPS} steps, as in the tests")
    parser.add_argument("--rank-in", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.rank_in:
        run_rank(args.rank_in)
        return
    if args.output is None:
        parser.error("--output is missing: expected a folder for equality.csv and equality.md")
    cells, steps = (reduced_cells(), REDUCED_STEPS) if args.reduced else (all_cells(), STEPS)
    with tempfile.TemporaryDirectory() as folder:
        rows = run(cells, steps, Path(folder))
    args.output.mkdir(parents=True, exist_ok=True)
    with (args.output / "equality.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].as_dict())
        writer.writeheader()
        writer.writerows(row.as_dict() for row in rows)
    text = as_markdown(rows, steps)
    (args.output / "equality.md").write_text(text)
    print(text)
    if not all(row.holds for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
