"""One rank of test_trajectory: trains with every engine and writes the state that the ranks hold together.

usage: worker_trajectory.py FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from fastjepa import checkpoint, distributed
from fastjepa.batch_sizes import BatchSizes
from fastjepa.checkpoint import RunState
from fastjepa.engine import build_engine
from fastjepa.objective import build_model
from tests.test_trajectory import STEPS, engine_steps, trajectory_config


def main(folder: Path) -> None:
    device = distributed.init()
    rank, world = distributed.rank(), distributed.world_size()
    results = {}
    for name, stage, clip, micro in [
        ("torch", None, None, None),
        ("zero0", 0, None, None),
        ("zero1", 1, None, None),
        ("zero2", 2, None, None),
        ("zero3", 3, None, None),
        ("zero2 clip accum", 2, 0.05, 1),
    ]:
        config = trajectory_config(clip_grad=clip, micro=micro)
        sizes = BatchSizes.share(config, world)
        ds_config = None
        if stage is not None:
            ds_config = folder / f"zero{stage}.json"
            if rank == 0:
                ds_config.write_text(json.dumps({"zero_optimization": {"stage": stage}, "steps_per_print": 10**9}))
            distributed.raise_together(None)
        engine = build_engine(build_model(config), config, sizes, device, ds_config)
        engine_steps(engine, config, sizes, rank, world, 0, STEPS)
        path = checkpoint.save(folder / name, engine, RunState(STEPS, {}, {}))
        if rank == 0:
            parts = ("context_encoder", "predictor", "target_encoder")
            results[name] = {f"{p}.{n}": w for p in parts for n, w in checkpoint.load_weights(path, p).items()}
    if rank == 0:
        torch.save(results, folder / "results.pt")
    distributed.raise_together(None)
    distributed.finish()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
