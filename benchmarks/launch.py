"""Start a module as the ranks of a run on this machine, as a launcher would."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
GRACE_SECONDS = 5.0
"""Seconds that the other ranks get to end by themselves after the first one failed."""


def free_port() -> int:
    """A TCP port that nothing listens on at the moment."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def launch(module: str, world: int, *args: str, timeout: float = 500, cuda: bool = False) -> None:
    """Run `python -m module *args` in `world` processes of one thread each. They see the GPUs only if `cuda`.

    Raises:
        RuntimeError: a rank failed, or `timeout` seconds have passed. Ranks that still run are killed; the message ends with
            the last output of every rank that did not end with status 0.
    """
    env = os.environ | {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    if not cuda:
        env["CUDA_VISIBLE_DEVICES"] = ""
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
        end = time.monotonic() + timeout
        failed = False
        try:
            while any(process.poll() is None for process in processes) and time.monotonic() < end:
                if not failed and any(process.poll() for process in processes):
                    # The first rank to end may only have lost its connection to another, which is still writing why.
                    failed, end = True, time.monotonic() + GRACE_SECONDS
                time.sleep(0.05)
            codes = [process.poll() for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.wait()
        if any(codes) or None in codes:
            ends = [
                f"rank {rank} {'did not end' if code is None else f'ended with {code}'}:\n{log.read_text()[-4000:]}"
                for rank, (code, log) in enumerate(zip(codes, logs, strict=True))
                if code != 0
            ]
            why = "a rank failed" if any(codes) else f"not done after {timeout:g} s"
            raise RuntimeError(f"{module} on {world} ranks: {why}\n" + "\n".join(ends))
