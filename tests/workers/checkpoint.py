"""One of two ranks of the fixture `two_ranks` of tests/checkpoint: what they write and read with DeepSpeed.

usage: python -m tests.workers.checkpoint FOLDER
Rank 0 writes results.pt there, for all ranks.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.proofs.equality import engine_steps, schedule, trajectory_config
from fastjepa import distributed
from fastjepa.checkpoint import restore, writer
from fastjepa.checkpoint.format import RunState
from fastjepa.config.batch_sizes import BatchSizes
from fastjepa.engine.deepspeed_engine import DeepSpeedEngine
from fastjepa.errors import CheckpointError, DamagedCheckpointError
from tests.support.small import config_of, engine_of

STEPS = 3
State = dict[str, dict[str, Tensor]]


def zero_engine(folder: Path, stage: int, precision: str = "fp32", seed: int = 0) -> DeepSpeedEngine:
    """Build an engine of this ZeRO stage, whose JSON is written into `folder`."""
    config = trajectory_config(precision=precision, seed=seed)
    path = folder / f"zero{stage}.json"
    if distributed.rank() == 0:
        path.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    distributed.raise_together(None)
    sizes = BatchSizes.share(config, distributed.world_size())
    engine = engine_of(config, sizes, torch.device("cpu"), path)
    assert isinstance(engine, DeepSpeedEngine)
    return engine


def train(engine: DeepSpeedEngine, first: int, last: int) -> None:
    """Train steps `first` to `last` - 1."""
    config = config_of(engine)
    world = distributed.world_size()
    engine_steps(engine, config, BatchSizes.share(config, world), distributed.rank(), world, first, last)


def gathered(engine: DeepSpeedEngine) -> State:
    """Put weight, exp_avg and exp_avg_sq of every parameter together from the pieces of all ranks, without a checkpoint."""
    mine = []
    for piece in engine.pieces():
        for kind, tensor in {"weight": piece.tensor, **engine.optimizer.moments(piece.tensor)}.items():
            mine.append((kind, piece.name, piece.start, piece.view(tensor).clone()))
    state: State = {"weight": {}, "exp_avg": {}, "exp_avg_sq": {}}
    shapes = engine.shapes()
    for pieces in distributed.gather_objects(mine):
        for kind, name, start, values in pieces:
            flat = state[kind].setdefault(name, torch.full(shapes[name], torch.nan)).view(-1)
            flat[start : start + values.numel()] = values
    return state


def model_is_published(engine: DeepSpeedEngine, state: State) -> list[bool]:
    """Compare the model's own weights with the state, rounded to the model's precision: equal or not, for each rank."""
    weights = dict(engine.model.named_parameters())
    return distributed.gather_objects(
        all(torch.equal(p, state["weight"][name].to(p.dtype)) for name, p in weights.items())
    )


def error_of_ema(engine: DeepSpeedEngine) -> list[float]:
    """Train some steps, and compare the EMA with a float64 EMA of the fp32 weights: the largest error of each rank."""
    sources = {p.name: p for p in engine.pieces() if p.name.startswith("context_encoder.")}
    targets = {p.name.replace("target_", "context_"): p for p in engine.pieces() if p.name.startswith("target_")}
    exact = {name: piece.view(piece.tensor).double() for name, piece in targets.items()}
    for step in range(STEPS):
        train(engine, step, step + 1)
        momentum = schedule(config_of(engine)).at(step)["ema_momentum"]
        for name, piece in sources.items():
            exact[name] = momentum * exact[name] + (1 - momentum) * piece.view(piece.tensor).double()
    errors = [(exact[name] - piece.view(piece.tensor)).abs().max().item() for name, piece in targets.items()]
    return distributed.gather_objects(max(errors))


def resumed_beside_uninterrupted(
    checkpoint: Path, stage: int, precision: str, uninterrupted: DeepSpeedEngine
) -> tuple[State, State]:
    """Load the checkpoint into another engine, and train this one and the one that wrote it: the states they end with."""
    resumed = zero_engine(checkpoint.parents[1], stage, precision, seed=1)
    restore.load(checkpoint, resumed)
    for engine in (resumed, uninterrupted):
        train(engine, STEPS, 2 * STEPS)
    return gathered(resumed), gathered(uninterrupted)


def save_with_a_full_disk(folder: Path, engine: DeepSpeedEngine) -> list[str]:
    """Save while rank 1 cannot write, and return the message of the error for each rank."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if distributed.rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, limits[1]))
    try:
        writer.save(folder, engine, RunState(STEPS + 1, {}, {}))
        message = "saved"
    except CheckpointError as error:
        message = str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return distributed.gather_objects(message)


def errors_of_two_types() -> list[str]:
    """Raise errors of two types together, and return what each rank caught."""
    try:
        distributed.raise_together((CheckpointError, DamagedCheckpointError)[distributed.rank()]("lost"))
        raised = "nothing"
    except CheckpointError as error:
        raised = f"{type(error).__name__}: {error}"
    return distributed.gather_objects(raised)


def main(folder: Path) -> None:
    distributed.init()
    results: dict[str, Any] = {}
    reader = zero_engine(folder, 1)
    for stage in (2, 3):
        trained = zero_engine(folder, stage)
        train(trained, 0, STEPS)
        path = writer.save(folder / f"zero{stage}", trained, RunState(STEPS, {}, {}))
        results[f"zero{stage}"] = gathered(trained)
        restore.load(path, reader)
        state = gathered(reader)
        results[f"zero{stage} read by zero1"] = state, reader.optimizer.updates, model_is_published(reader, state)
        if stage == 2:
            results["full disk"] = save_with_a_full_disk(folder / "zero2", trained)
        results[f"zero{stage} fp32 goes on"] = resumed_beside_uninterrupted(path, stage, "fp32", trained)
    half = zero_engine(folder, 2, "bf16")
    results["errors of the EMA"] = error_of_ema(half)
    results["bf16 dtypes"] = sorted({str(p.dtype) for p in half.model.parameters()})
    results["bf16 published"] = model_is_published(half, gathered(half))
    path = writer.save(folder / "bf16", half, RunState(STEPS, {}, {}))
    results["zero2 bf16 goes on"] = resumed_beside_uninterrupted(path, 2, "bf16", half)
    results["errors of two types"] = errors_of_two_types()
    if distributed.rank() == 0:
        torch.save(results, folder / "results.pt")
    distributed.raise_together(None)
    distributed.finish()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
