"""A run that takes seconds, and how to start it as processes, for tests of the command line, launches and faults."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.launch import ROOT, free_port

RUN = """
global_batch_size: 8
log_interval: 1
checkpoint_interval: 4
evaluate: false
data: {source: DATA, image_size: 16, in_channels: 1, mean: [0.5], std: [0.25], loader: turbo, num_threads: 1}
model: {patch_size: 4, embed_dim: 16, depth: 1, num_heads: 2, init: fan_in}
objective: {predictor_embed_dim: 16, predictor_depth: 1, masks: {min_keep: 3}}
optim: {warmup_epochs: 0.25}
"""
# Runs train.main after FAULT, which is code that injects a fault.
FAULTY = """
import os, signal, sys, time
from dataclasses import replace
import torch
from fastjepa import distributed, train
from fastjepa.engine import deepspeed_engine, torch_engine
FAULT
sys.exit(train.main(sys.argv[1:]))
"""


def write_recipe(folder: Path, *lines: str) -> str:
    """Write run.yaml, with more `lines`, and 70 grey images of different sizes without labels; return the path of run.yaml.

    An epoch has 8 steps.
    """
    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    for index in range(70):
        pixels = rng.integers(0, 256, (18 + index % 5, 18 + index % 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{index:03d}.png")
    (folder / "run.yaml").write_text(RUN.replace("DATA", str(folder / "images")) + "\n".join(lines))
    return str(folder / "run.yaml")


def at_step(step: int, action: str, rank: int = 0) -> str:
    """Return code that runs `action` on one rank, before the micro batch of a step (counted from 0) of a TorchEngine."""
    return f"""
plain, steps = torch_engine.TorchEngine.micro_step, 0
def micro_step(self, batch):
    global steps
    steps += 1
    if steps == {step} + 1 and distributed.rank() == {rank}:
        {action}
    return plain(self, batch)
torch_engine.TorchEngine.micro_step = micro_step
"""


def start(fault: str, arguments: list[str], world: int = 1) -> list[subprocess.Popen[str]]:
    """Start the ranks of a run with a fault, which is code; an empty string for none."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    if world > 1:
        env |= {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-c", FAULTY.replace("FAULT", fault), *arguments]
    return [
        subprocess.Popen(
            command,
            env=env | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else {}),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]


def ended(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """Wait for the processes; return the exit status and the messages of each."""
    messages = [process.communicate(timeout=100)[1] for process in processes]
    return [(process.returncode, message) for process, message in zip(processes, messages, strict=True)]


def metrics(run: Path, *keys: str) -> list[list[Any]]:
    """Read the values of `keys` from each line of metrics.jsonl."""
    lines = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    return [[line[key] for key in keys] for line in lines]
