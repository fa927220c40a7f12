"""Checkpoints that the tests of this folder read: of one rank of plain PyTorch, and of two ranks of ZeRO."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.launch import launch
from fastjepa.checkpoint import writer
from fastjepa.checkpoint.format import RunState
from fastjepa.engine.base import Engine
from tests.support.checkpoints import state_of, torch_engine, train


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """A checkpoint of step 6, which no test may change, the state at step 6 and the state at step 12."""
    engine = train(torch_engine(), 0, 6)
    path = writer.save(tmp_path_factory.mktemp("run"), engine, RunState(6, {"key": [1, None]}, {"images": 7}))
    at_6 = state_of(engine)
    return path, at_6, state_of(train(engine, 6, 12))


@pytest.fixture
def saved(uninterrupted: tuple[Path, Any, Any], tmp_path: Path) -> Path:
    """A copy of the checkpoint of step 6, which a test may damage."""
    return Path(shutil.copytree(uninterrupted[0].parent, tmp_path / "run")) / uninterrupted[0].name


@pytest.fixture(scope="session")
def reader() -> Engine:
    """An engine for loads that fail and for saves whose content does not matter."""
    return torch_engine()


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder and the results of tests.workers.checkpoint: what two processes wrote and read by ZeRO."""
    folder = tmp_path_factory.mktemp("two_ranks")
    launch("tests.workers.checkpoint", 2, str(folder))
    return folder, torch.load(folder / "results.pt", weights_only=True)
