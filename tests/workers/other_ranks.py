"""One of two ranks of a test of tests/test_faults.py, which continue a run with ZeRO 2 and then with ZeRO 3.

usage: python -m tests.workers.other_ranks RECIPE RUN
A signal stops each of the two parts.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.launch import ROOT
from fastjepa import distributed
from fastjepa.config.batch_sizes import BatchSizes
from fastjepa.data import Batch, open_dataset
from fastjepa.engine.build import build_engine
from fastjepa.errors import Preempted
from fastjepa.objectives.registry import build_objective, load_config, method_of
from fastjepa.run.folder import RunFolder
from fastjepa.run.meter import Meter
from fastjepa.run.stop_request import StopRequest
from fastjepa.trainer import Trainer
from tests.workers.loader import describe

CONFIGS = ROOT / "configs"


class Seeing(Trainer):
    """A trainer that writes what each step saw (identity, crop, pixels and masks of every image) to seen_RANK.jsonl."""

    signal_in_step: int | None = None

    def _next(self, batches: Iterator[Batch], meter: Meter) -> Batch:  # type: ignore[override]
        batch = super()._next(batches, meter)
        step = self.start_step + self._steps_seen
        self._steps_seen += 1
        with (self.folder.path / f"seen_{distributed.rank()}.jsonl").open("a") as file:
            file.write(json.dumps([step, describe(batch)]) + "\n")
        if step == self.signal_in_step:
            os.kill(os.getpid(), signal.SIGUSR1)
        return batch

    _steps_seen = 0


def go_on(recipe: str, run: Path, stage: int | None, signal_in_step: int | None) -> None:
    """Train with plain PyTorch (None) or a stage of ZeRO, up to the signal or to the end of the run."""
    # optim.eps is that of benchmarks.proofs.equality, which explains it.
    config = load_config(recipe, [f"output_dir={run}", "keep_last=100", "optim.eps=1e-4"])
    sizes = BatchSizes.share(config, distributed.world_size())
    ds_config = None if stage is None else CONFIGS / f"zero{stage}.json"
    method = method_of(config)
    engine = build_engine(build_objective(method), method, config, sizes, torch.device("cpu"), ds_config)
    folder, dataset = RunFolder(run), open_dataset(config.data, "train")
    assert dataset is not None
    folder.create()
    trainer = Seeing(method, dataset, engine, sizes, folder)
    trainer.signal_in_step = signal_in_step
    with contextlib.suppress(Preempted), StopRequest() as stop_request:
        trainer.run(stop_request)


def main(recipe: str, run: Path) -> None:
    distributed.init()
    go_on(recipe, run, stage=2, signal_in_step=12)
    go_on(recipe, run, stage=3, signal_in_step=20)
    distributed.finish()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
