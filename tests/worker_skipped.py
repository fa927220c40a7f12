"""One rank of test_faults: by every engine three steps, of which the second has a loss of NaN on the second rank.

usage: worker_skipped FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from benchmarks.equality import engine_steps, trajectory_config
from fastjepa import distributed
from fastjepa.batch_sizes import BatchSizes
from fastjepa.engine import Engine, build_engine
from fastjepa.objective import build_model
from tests.test_faults import bad_loss


def state(engine: Engine) -> list[torch.Tensor]:
    tensors = [piece.view(piece.tensor) for piece in engine.pieces()]
    shards = [getattr(p, "ds_tensor", p) for p in engine.model.parameters()]  # of stage 3
    return [x.clone() for x in (*tensors, *shards)]


def main(folder: Path) -> None:
    device = distributed.init()
    rank, world = distributed.rank(), distributed.world_size()
    results = {}
    for stage in (None, 0, 1, 2, 3):
        for precision in ("fp32", "bf16"):
            config = trajectory_config(precision=precision, clip_grad=0.1)
            sizes = BatchSizes.share(config, world)
            ds_config = None
            if stage is not None:
                ds_config = folder / f"zero{stage}.json"
                text = {"zero_optimization": {"stage": stage}, "bf16": {"check_grad_overflow": False}}
                if rank == 0:
                    ds_config.write_text(json.dumps(text))
                distributed.raise_together(None)
            engine = build_engine(build_model(config), config, sizes, device, ds_config)
            engine_steps(engine, config, sizes, rank, world, 0, 1)
            before, first = state(engine), engine.optimizer.updates
            with bad_loss({0}, rank=1):
                engine_steps(engine, config, sizes, rank, world, 1, 2)
            assert all(torch.equal(x, y) for x, y in zip(before, state(engine), strict=True)), (stage, precision)
            assert int(engine.skipped_in_a_row()) == 1
            skipped = engine.optimizer.updates
            engine_steps(engine, config, sizes, rank, world, 2, 3)
            assert not all(torch.equal(x, y) for x, y in zip(before, state(engine), strict=True)), (stage, precision)
            mine = [first, skipped, int(engine.skipped_in_a_row())]
            results["torch" if stage is None else f"zero{stage}"] = distributed.gather_objects(mine)
    if rank == 0:
        (folder / "results.json").write_text(json.dumps(results))
    distributed.raise_together(None)
    distributed.finish()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
