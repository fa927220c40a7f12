"""python -m benchmarks.loader --soak: memory of a process whose Loader prepares very many batches of small images."""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path

import torch

from benchmarks.loader.contestants import DALI_ON_GPU, OURS, open_loader, problem_with
from benchmarks.loader.photographs import make_photographs
from fastjepa.config import Config, DataConfig
from fastjepa.host import MIB
from fastjepa.objectives.ijepa.settings import IJEPAConfig


def soak(folder: Path, num_batches: int, batch_size: int, threads: int, device: torch.device) -> dict[str, list[float]]:
    """Print the resident memory in MiB after each tenth of the batches, and return it by decoder."""
    files = make_photographs(folder, (160, 120), 4 * batch_size)
    memory: dict[str, list[float]] = {}
    for name in ("fastjepa turbo", DALI_ON_GPU if device.type == "cuda" else "fastjepa DALI, CPU"):
        if problem := problem_with(name):
            print(f"{name}: {problem}")
            continue
        data = DataConfig(source=str(files[0].parent), image_size=96, num_threads=threads, **OURS[name][0])  # type: ignore[arg-type]
        memory[name] = []
        with closing(
            open_loader(Config(data=data, objective=IJEPAConfig(), global_batch_size=batch_size), device)
        ) as loader:
            for done in range(1, num_batches + 1):
                next(loader)
                if 10 * done // num_batches > len(memory[name]):
                    memory[name].append(_resident_mib())
        points, growth = " ".join(f"{mib:.0f}" for mib in memory[name]), memory[name][-1] - memory[name][0]
        print(f"{name}: {num_batches} batches of {batch_size} small images")
        print(f"  resident MiB at 10 %, 20 %, ... 100 %: {points}; growth {growth:+.1f}")
    return memory


def _resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / MIB
