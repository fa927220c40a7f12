"""One of two ranks of a test of tests/test_faults.py: four steps of two micro batches with every engine.

On rank 1 the loss is NaN in the first micro batch of step 1 and in the second one of step 2 (steps count from 0).

usage: python -m tests.workers.skipped FOLDER
Rank 0 writes results.json there.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from benchmarks.launch import ROOT
from benchmarks.proofs.equality import engine_steps, trajectory_config
from fastjepa import distributed
from fastjepa.config.batch_sizes import BatchSizes
from fastjepa.engine.base import Engine
from tests.support.small import engine_of, finish_with
from tests.test_faults import bad_loss


def state(engine: Engine) -> list[torch.Tensor]:
    """Copy all that a step changes on this rank: weights, EMA and moments, and the weights that the model computes with."""
    tensors = [
        piece.view(tensor)
        for piece in engine.pieces()
        for tensor in (piece.tensor, *engine.optimizer.moments(piece.tensor).values())
    ]
    shards = [getattr(p, "ds_tensor", p) for p in engine.model.parameters()]  # of stage 3
    return [x.clone() for x in (*tensors, *shards)]


def main(folder: Path) -> None:
    device = distributed.init()
    rank, world = distributed.rank(), distributed.world_size()
    results = {}
    for name in ("torch", "zero0", "zero1", "zero2", "zero3"):
        for precision in ("fp32", "bf16"):
            config = trajectory_config(precision=precision, clip_grad=0.1, micro=1)
            sizes = BatchSizes.share(config, world)
            assert sizes.accum == 2
            ds_config = None if name == "torch" else ROOT / "configs" / f"{name}.json"
            engine = engine_of(config, sizes, device, ds_config)
            engine_steps(engine, config, sizes, rank, world, 0, 1)
            before, counts = state(engine), [(engine.optimizer.updates, int(engine.skipped_in_a_row()))]
            changed = []
            for step, bad in ((1, {0}), (2, {1}), (3, set[int]())):
                with bad_loss(bad, rank=1):
                    engine_steps(engine, config, sizes, rank, world, step, step + 1)
                changed.append(any(not torch.equal(x, y) for x, y in zip(before, state(engine), strict=True)))
                counts.append((engine.optimizer.updates, int(engine.skipped_in_a_row())))
            results[f"{name} {precision}"] = distributed.gather_objects({"counts": counts, "changed": changed})
    finish_with(results, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
