"""Starts a module as the ranks of a run on this machine, as a launcher would."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def launch(module: str, world: int, *args: str, timeout: float = 500) -> None:
    """Run `python -m module *args` as `world` processes of one thread each.

    Raises:
        RuntimeError: a rank failed (the others are then killed) or the time is over; with the end of what the rank wrote.
    """
    env = os.environ | {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    deadline = time.monotonic() + timeout
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / f"rank{rank}.log" for rank in range(world)]
        processes = []
        for rank, log in enumerate(logs):
            with log.open("w") as file:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", module, *args],
                        env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                        stdout=file,
                        stderr=subprocess.STDOUT,
                    )
                )
        try:
            while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
                if any(process.poll() for process in processes):
                    break
                time.sleep(0.05)
            for rank, (process, log) in enumerate(zip(processes, logs, strict=True)):
                code = process.poll()
                if code:
                    raise RuntimeError(
                        f"{module}: rank {rank} of {world} ended with {code}:\n{log.read_text()[-4000:]}"
                    )
            if any(process.poll() is None for process in processes):
                raise RuntimeError(f"{module}: not done after {timeout} s:\n{logs[0].read_text()[-4000:]}")
        finally:
            for process in processes:
                process.kill()
                process.wait()
