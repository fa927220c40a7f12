"""Patches of DeepSpeed."""

from __future__ import annotations

import os

import pytest
import torch

from fastjepa import distributed
from fastjepa.engine import deepspeed_patches


def test_zero_3_takes_the_only_gpu_that_slurm_shows_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    import deepspeed

    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(distributed, "init_single_process_group", lambda: None)
    monkeypatch.setattr(deepspeed, "initialize", lambda *_, **__: [os.environ["LOCAL_RANK"]])
    assert deepspeed_patches._initialize(None, None, {}, "zero3.json") == "0"  # type: ignore[arg-type]
    assert os.environ["LOCAL_RANK"] == "3"
