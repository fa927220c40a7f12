"""One of two ranks of tests/test_distributed.py: collects what both raise where one of them fails.

usage: python -m tests.workers.shared_errors FOLDER
Rank 0 writes results.json there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from fastjepa import distributed
from fastjepa.checkpoint import restore, writer
from fastjepa.checkpoint.checkpointer import Checkpointer
from fastjepa.checkpoint.format import RunState, newest_first
from fastjepa.checkpoint.writer import Snapshot
from fastjepa.config.batch_sizes import BatchSizes
from fastjepa.run.watchdog import Watchdog
from fastjepa.trainer import Trainer
from tests.support.small import engine_of, finish_with, small_config


def fails(rank: int, error: Exception) -> Callable[..., None]:
    """Make a function that raises the error on one rank and does nothing on the others."""

    def function(*_: object, **__: object) -> None:
        if distributed.rank() == rank:
            raise error

    return function


def raised(action: Callable[[], object]) -> list[str]:
    """Run the action, and return what each rank raised."""
    mine = "nothing"
    try:
        action()
    except Exception as error:  # noqa: BLE001
        mine = f"{type(error).__name__}: {error}"
    return distributed.gather_objects(mine)


def main(folder: Path) -> None:
    distributed.COLLECTIVE_TIMEOUT = 30.0  # seconds: if a rank waits in spite of all, the test fails soon
    distributed.init()
    rank = distributed.rank()
    config = small_config(output_dir=str(folder))
    engine = engine_of(config, BatchSizes.share(config, 2), torch.device("cpu"))
    checkpoints = folder / "checkpoints"
    saved = writer.save(checkpoints, engine, RunState(1, {}, {}))
    results = {}

    def fail_with(*errors: Exception | None) -> None:
        """Raise, within `share_errors`, the error that stands at this rank's place."""
        with distributed.share_errors():
            if error := errors[rank]:
                raise error

    results["another type"] = raised(lambda: fail_with(None, KeyError("x")))
    results["two"] = raised(lambda: fail_with(OSError("disk"), KeyError("x")))
    results["heartbeats"] = raised(lambda: Watchdog((saved / "index.json" if rank == 0 else folder) / "beats", 60))
    with mock.patch.object(Tensor, "copy_", fails(1, MemoryError("none left"))):
        results["load"] = raised(lambda: restore.load(saved, engine))
    with mock.patch.object(writer, "_write_shard", fails(0, MemoryError("full"))):
        results["write"] = raised(lambda: writer.save(checkpoints, engine, RunState(2, {}, {})))
    results["left"] = [path.name for path in newest_first(checkpoints)]
    with (
        Checkpointer(checkpoints, keep_last=1, keep_every=None, asynchronous=True) as saves,
        mock.patch.object(Snapshot, "copied", fails(1, MemoryError("no copy"))),
    ):
        results["copy"] = raised(lambda: saves.save(engine, RunState(3, {}, {}), last=False))
    with mock.patch("fastjepa.trainer.Loader", fails(1, RuntimeError("DALI"))):
        results["loader"] = raised(lambda: Trainer._loader(mock.Mock()))
    finish_with(results, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
