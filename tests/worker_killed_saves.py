"""Saves a checkpoint again and again, each time killed (SIGKILL) one file operation later, until a save comes through.

usage: worker_killed_saves FOLDER
Writes results.json there, an entry per kill: the file operation that it came before, and the number of updates in the
checkpoint that loads afterwards (1: the old one, 2: the new one).
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from fastjepa import checkpoint, checkpoint_writer
from fastjepa.checkpoint import RunState
from tests.test_checkpoint import torch_engine

STEPS = {"the next step": 2, "the same step again": 1}
FILE_OPERATIONS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")


def die_before_operation(number: int, log: Path) -> None:
    seen = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in FILE_OPERATIONS:
            seen += 1
            if seen == number:
                os.write(descriptor, f"{event} {arguments[0]}".encode())
                os.kill(os.getpid(), signal.SIGKILL)

    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    sys.addaudithook(hook)


def kill_saves(folder: Path, step: int) -> list[tuple[str, int]]:
    """Over a checkpoint of step 1, save one of `step`."""
    old, new, reader = torch_engine(), torch_engine(), torch_engine()
    for engine, updates in ((old, 1), (new, 2)):
        engine.optimizer.updates = updates
    outcomes: list[tuple[str, int]] = []
    for number in range(1, 1000):
        run = folder / str(number)
        checkpoint_writer.save(run, old, RunState(1, {}, {}))
        child = os.fork()
        if child == 0:
            die_before_operation(number, folder / "event")
            checkpoint_writer.save(run, new, RunState(step, {}, {}))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            return outcomes
        newest = checkpoint.latest(run)
        assert newest is not None
        checkpoint.load(newest, reader)
        outcomes.append(((folder / "event").read_text(), reader.optimizer.updates))
        checkpoint_writer.save(run, new, RunState(step, {}, {}))  # what was left behind is not in the way
        shutil.rmtree(run)
    raise AssertionError("no save came through")


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    results = {name: kill_saves(folder / str(step), step) for name, step in STEPS.items()}
    (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
