"""Engines whose checkpoints the tests save and load, and what they compare."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.proofs.equality import engine_steps, full_state, trajectory_config
from fastjepa.config.batch_sizes import BatchSizes
from fastjepa.engine.base import Engine
from fastjepa.errors import CheckpointError
from tests.support.small import engine_of

CONFIG = trajectory_config()
SIZES = BatchSizes.share(CONFIG, world_size=1)
KINDS = ("weight", "exp_avg", "exp_avg_sq")


def torch_engine(**changes: Any) -> Engine:
    """Build an engine of plain PyTorch on the CPU, with these settings of `Config` in place of those of CONFIG."""
    return engine_of(trajectory_config(**changes), SIZES, torch.device("cpu"))


def train(engine: Engine, first: int, last: int) -> Engine:
    """Train steps `first` to `last` - 1, and return the engine."""
    engine_steps(engine, CONFIG, SIZES, 0, 1, first, last)
    return engine


def state_of(engine: Engine) -> dict[str, dict[str, Tensor]]:
    """Copy the fp32 weights and EMA, and both moments of the parameters that have them: kind -> name -> tensor."""
    state = {"weight": full_state(engine)}
    for kind in KINDS[1:]:
        moments = [(p, engine.optimizer.moments(p.tensor)) for p in engine.pieces()]
        state[kind] = {p.name: p.view(m[kind]).clone() for p, m in moments if m}
    return state


def assert_identical(mine: dict[str, dict[str, Tensor]], expected: dict[str, dict[str, Tensor]]) -> None:
    """Check that two results of `state_of` are equal to the last bit."""
    for kind in KINDS:
        assert mine[kind].keys() == expected[kind].keys() != set()
        for name, tensor in expected[kind].items():
            assert torch.equal(mine[kind][name].view(-1), tensor.view(-1)), f"{name}.{kind}"


def reseal(checkpoint: Path) -> None:
    """Write checksums that match the changed files, as anyone who forges a checkpoint can."""
    names = [path.name for path in checkpoint.iterdir() if path.name != "SHA256SUMS"]
    lines = [f"{hashlib.sha256((checkpoint / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (checkpoint / "SHA256SUMS").write_text("".join(lines))


def error_text(found: pytest.ExceptionInfo[CheckpointError], folder: Path) -> str:
    """Return an error's message for `record`, without the name of the test's folder."""
    return f"the error: {found.value}".replace(f"{folder}/", "")
