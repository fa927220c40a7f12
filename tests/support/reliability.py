"""Write the fault table, from the tests that inject faults and from 50 kills at random moments.

    python -m tests.support.reliability [--output docs/reliability.md] [--kills 50]

A test adds a row with the fixture `record` after its assertions held; it measured or asserted what happened and was lost.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from benchmarks.launch import ROOT, free_port
from fastjepa.checkpoint.format import latest
from tests.support.tiny_run import write_recipe

Record = Callable[[str, str, str], None]
"""Type of the fixture `record`."""


def files_of_faults() -> list[Path]:
    """Return the test files that fill the table, which are those that use `record`: whole runs first, then by name."""
    files = [
        path for path in (ROOT / "tests").rglob("test_*.py") if "record: Record" in path.read_text(encoding="utf-8")
    ]
    return sorted(files, key=lambda path: (len(path.parts), path))


class Rows:
    """A pytest plugin that collects the rows."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, str, str]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:
            self.rows += [row for name, row in report.user_properties if name == "fault"]  # type: ignore[misc]


class Kills(NamedTuple):
    """What a run that was killed again and again came to."""

    kills: int
    within_saves: int
    """Number of kills that left a checkpoint half written."""
    repeated: int
    """Number of steps that were trained again, summed over all kills."""
    equal: bool
    """True if the last checkpoint equals that of the undisturbed run, to the last bit."""


def survive_kills(folder: Path, arguments: list[str], *, kills: int, steps: int, seed: int) -> Kills:
    """Train on two ranks twice: undisturbed, and killing one rank or both (SIGKILL) again and again.

    A checkpoint is written every third step, so that many kills hit a save.

    Args:
        folder: folder of both runs.
        arguments: command line of the run.
        kills: number of kills.
        steps: number of steps of the run; it must last longer than the kills.
        seed: seed of the moments and of the choice of ranks.
    """
    rng = random.Random(seed)
    arguments = [*arguments, f"epochs={steps / 8}", "checkpoint_interval=3"]
    calm, killed = folder / "calm", folder / "killed"
    _wait(_start([*arguments, f"output_dir={calm}"]))
    done = within_saves = repeated = 0
    while done < kills:
        started = time.time()
        processes = _start([*arguments, f"output_dir={killed}"])
        before = _steps(killed)
        while _steps(killed) <= before + 1 and all(process.poll() is None for process in processes):
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.5))
        if any(process.poll() is not None for process in processes):
            _wait(processes)
            raise AssertionError(f"the run was over after {done} kills: ask for more steps")
        victims = rng.choice((processes, processes[:1], processes[1:]))
        for process in victims:
            process.send_signal(signal.SIGKILL)
        for process in processes:
            process.wait(timeout=100)
        done += 1
        newest = latest(killed / "checkpoints")
        saved = 0 if newest is None else int(newest.name.rpartition("_")[2])
        repeated += max(0, _steps(killed) - saved)
        half_written = (killed / "checkpoints").glob(".step_*.tmp")
        within_saves += any(path.stat().st_mtime >= started for path in half_written)
    _wait(_start([*arguments, f"output_dir={killed}"]))
    last = f"checkpoints/step_{steps:08d}"
    equal = [(killed / last / file.name).read_bytes() == file.read_bytes() for file in (calm / last).glob("rank_*")]
    return Kills(done, within_saves, repeated, bool(equal) and all(equal))


def _start(arguments: list[str]) -> list[subprocess.Popen[bytes]]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]), "OMP_NUM_THREADS": "1"}
    env |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / "fastjepa" / "train.py"), *arguments]
    return [
        subprocess.Popen(command, env=env | {"RANK": rank, "LOCAL_RANK": rank}, stderr=subprocess.DEVNULL)
        for rank in "01"
    ]


def _wait(processes: list[subprocess.Popen[bytes]]) -> None:
    statuses = [process.wait(timeout=500) for process in processes]
    assert statuses == [0, 0], statuses


def _steps(run: Path) -> int:
    """Return the step of the last line of metrics.jsonl. The line may be incomplete, but it begins with the step."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return int(lines[-1].partition('"step": ')[2].partition(",")[0] or 0) if lines else 0


HEAD = """# What a run survives

Written by `python -m tests.support.reliability`. Every row is a test that injected the fault into a small run on CPUs and
whose assertions held. Nothing was tried on GPUs yet.

| fault | what happened | what was lost |
|---|---|---|
"""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.support.reliability", description="Write the fault table.")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "reliability.md")
    parser.add_argument("--kills", type=int, default=50)
    options = parser.parse_args()
    plugin = Rows()
    if pytest.main([*map(str, files_of_faults()), "-q", "-p", "no:cacheprovider"], plugins=[plugin]) != 0:
        return 1
    zero2 = ["--ds_config", str(ROOT / "configs" / "zero2.json")]
    for engine, more in {"plain PyTorch": [], "ZeRO 2": zero2}.items():
        with tempfile.TemporaryDirectory() as name:
            arguments = ["--config", write_recipe(Path(name)), *more]
            count = options.kills // 2
            kills = survive_kills(Path(name), arguments, kills=count, steps=40 * count, seed=0)
        assert kills.equal, engine
        assert kills.within_saves, engine
        fault = (
            f"kill -9 of one rank or both at {count} random moments of one run ({engine}), checkpoints every 3 steps"
        )
        happened = f"{kills.within_saves} left a save half written; resumed each time; the end equal to the last bit"
        plugin.rows.append((fault, happened, f"{kills.repeated} steps in all, trained again"))
    options.output.parent.mkdir(exist_ok=True)
    options.output.write_text(HEAD + "".join(f"| {' | '.join(row)} |\n" for row in plugin.rows), encoding="utf-8")
    print(f"{options.output}: {len(plugin.rows)} faults")
    return 0


if __name__ == "__main__":
    sys.exit(main())
