"""Save checkpoints in the background, as a run does, in child processes that are killed.

The kills come before every file operation of a save and of the deletion after it, and at random bytes of every file.

usage: python -m tests.workers.killed_saves FOLDER [KILLS_PER_FILE]
It writes results.json there, with an entry for each kill.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastjepa.checkpoint import restore, writer
from fastjepa.checkpoint.checkpointer import Checkpointer
from fastjepa.checkpoint.format import RunState, latest
from tests.support.checkpoints import assert_identical, state_of, torch_engine, train

STEPS = {"the next step": 2, "the same step again": 1}
FILE_OPERATIONS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")
FILES = ("rank_00000.safetensors", "index.json", "model.safetensors", "SHA256SUMS", "latest")


class Saves:
    """Saves of two states of an engine, number 1 and number 2."""

    def __init__(self) -> None:
        self._engines = {1: train(torch_engine(), 0, 1), 2: train(torch_engine(seed=1), 0, 2)}
        self._states = {number: state_of(engine) for number, engine in self._engines.items()}
        self._reader = torch_engine()

    def save(self, run: Path, step: int, number: int, before: Callable[[], None] = lambda: None) -> int:
        """Save a state in the background, in a child process that first calls `before`; only the newest checkpoint is kept.

        Returns:
            The signal that ended the child, or 0.
        """
        child = os.fork()
        if child == 0:
            try:
                before()
                with Checkpointer(run, keep_last=1, keep_every=None, asynchronous=True) as saves:
                    saves.save(self._engines[number], RunState(step, {"number": number}, {}), last=False)
                os._exit(0)
            finally:
                os._exit(1)
        _, status = os.waitpid(child, 0)
        assert not os.WIFEXITED(status) or os.WEXITSTATUS(status) == 0
        return os.WTERMSIG(status)

    def loaded(self, run: Path) -> int:
        """Load the newest checkpoint, check that it is one of the states to the last bit, and return that state's number."""
        newest = latest(run)
        assert newest is not None
        number = restore.load(newest, self._reader).config["number"]
        assert_identical(state_of(self._reader), self._states[number])
        assert self._reader.optimizer.updates == number
        return int(number)


def before_operation(number: int, log: Path) -> Callable[[], None]:
    """Return a function that makes the process end before its file operation `number`, whose name it writes to `log`."""

    def arm() -> None:
        seen = 0
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal seen
            if event in FILE_OPERATIONS and not str(arguments[0]).startswith(("/proc/", "/sys/")):
                seen += 1
                if seen == number:
                    os.write(descriptor, f"{event} {arguments[0]}".encode())
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)

    return arm


def at_byte(name: str, byte: int) -> Callable[[], None]:
    """Return a function that makes the process end when it writes beyond `byte` bytes of the file `name`."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and Path(str(arguments[0])).name in (name, f".{name}.tmp"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (byte, byte))

    def arm() -> None:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it
        sys.addaudithook(hook)

    return arm


def kill_at_operations(saves: Saves, folder: Path, step: int) -> list[tuple[str, int]]:
    """Save state 1 at step 1, then kill the save of state 2 at `step` before each of its operations in turn.

    Returns:
        For each kill the operation before which it came, and the number of the state that loads afterwards.
    """
    outcomes: list[tuple[str, int]] = []
    for number in range(1, 1000):
        run = folder / str(number)
        assert saves.save(run, 1, 1) == 0
        if saves.save(run, step, 2, before_operation(number, folder / "event")) == 0:
            return outcomes
        outcomes.append(((folder / "event").read_text(), saves.loaded(run)))
        assert saves.save(run, step, 2) == 0  # the remains do not hinder it, and it removes them
        assert sorted(path.name for path in run.iterdir()) == ["latest", f"step_{step:08d}"]
        shutil.rmtree(run)
    raise AssertionError("no save came through")


def kill_at_bytes(saves: Saves, run: Path, kills_per_file: int) -> list[dict[str, Any]]:
    """Kill the saves of one run at random bytes of each file in turn; after every seventh kill a save comes through."""
    rng = random.Random(0)
    step = 1
    assert saves.save(run, step, 1) == 0
    sizes = {path.name: path.stat().st_size for path in run.rglob("*") if path.is_file()}
    outcomes = []
    for kill in range(kills_per_file * len(FILES)):
        name = FILES[kill % len(FILES)]
        byte = rng.randrange(sizes[name])
        before, new = 2 - step % 2, 1 + step % 2
        ended_by = saves.save(run, step + 1, new, at_byte(name, byte))
        hidden = [path for path in run.rglob("*") if path.is_file() and "/." in str(path.relative_to(run.parent))]
        outcomes.append(
            {
                "file": name,
                "byte": byte,
                "signal": ended_by,
                "cut there": any(path.stat().st_size == byte for path in hidden),
                "before": before,
                "loaded": saves.loaded(run),
                "hidden": sorted(path.name for path in run.glob(".*")),
            }
        )
        if kill % 7 == 6:
            step += 1
            assert saves.save(run, step, new) == 0
            assert sorted(path.name for path in run.iterdir()) == ["latest", f"step_{step:08d}"]
    return outcomes


def main(folder: Path, kills_per_file: int = 8) -> None:
    torch.set_num_threads(1)
    saves = Saves()
    writer.save(
        folder / "first", torch_engine(), RunState(1, {}, {})
    )  # so that the imports of a save are no operations of the killed ones
    results: dict[str, Any] = {
        "operations": {name: kill_at_operations(saves, folder / str(step), step) for name, step in STEPS.items()},
        "bytes": kill_at_bytes(saves, folder / "bytes", kills_per_file),
    }
    (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
