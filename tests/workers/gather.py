"""One of two ranks of a test of tests/engine/test_zero_gather.py.

They train with DeepSpeed's own gather of the weights and with the one that travels under the next step, and compare.

usage: python -m tests.workers.gather FOLDER
Rank 0 writes results.json there: for each rank, which weights are equal to those of DeepSpeed's gather.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.launch import ROOT
from benchmarks.proofs.equality import engine_steps, trajectory_config
from fastjepa import distributed
from fastjepa.config.batch_sizes import BatchSizes
from fastjepa.engine import deepspeed_patches
from fastjepa.engine.zero_gather import WeightGather
from tests.support.small import engine_of, finish_with

all_gather = dist.all_gather_single


class Late:
    """A gather whose result arrives only when it is waited for."""

    def __init__(self, output: Tensor, mine: Tensor, group: Any) -> None:
        self._output, self._mine, self._group = output, mine.clone(), group

    def wait(self) -> None:
        all_gather(self._output, self._mine, group=self._group)


def late(output: Tensor, mine: Tensor, group: Any = None, async_op: bool = False) -> Any:
    return Late(output, mine, group) if async_op else all_gather(output, mine, group=group)


def main(folder: Path) -> None:
    device = distributed.init()
    rank, world = distributed.rank(), distributed.world_size()
    wait_for = WeightGather._wait_for
    results: dict[str, dict[str, bool]] = {}
    for stage in (1, 2):
        for precision in ("fp32", "bf16"):
            config = trajectory_config(precision=precision, clip_grad=0.05, micro=1)
            sizes = BatchSizes.share(config, world)
            ds_config = ROOT / "configs" / f"zero{stage}.json"
            weights = {}
            for kind in ("deepspeed", "overlapped", "late", "never waited for"):
                deepspeed_patches.GATHER = "absent" if kind == "deepspeed" else "all_gather_dp_groups"
                gather: Any = late if kind in ("late", "never waited for") else all_gather
                dist.all_gather_single = gather
                wait: Any = (lambda *_: None) if kind == "never waited for" else wait_for
                WeightGather._wait_for = wait  # type: ignore[method-assign]
                engine = engine_of(config, sizes, device, ds_config)
                engine_steps(engine, config, sizes, rank, world, 0, 5)
                weights[kind] = [p.detach().clone() for p in engine.model.parameters()]
            results[f"{stage} {precision}"] = {
                kind: all(torch.equal(x, y) for x, y in zip(theirs, weights["deepspeed"], strict=True))
                for kind, theirs in weights.items()
            }
    finish_with(distributed.gather_objects(results), folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
