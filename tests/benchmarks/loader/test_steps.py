"""benchmarks.loader --step compares steps on real and on synthetic images."""

from __future__ import annotations

from functools import partial

import pytest

from benchmarks.loader import steps
from benchmarks.loader.__main__ import main
from fastjepa.config import ModelConfig
from fastjepa.objectives.ijepa.settings import IJEPAConfig


def test_steps_on_real_and_synthetic_images_are_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small_model = partial(ModelConfig, embed_dim=24, depth=1, num_heads=3)
    monkeypatch.setattr(steps, "ModelConfig", small_model)
    monkeypatch.setattr(steps, "IJEPAConfig", partial(IJEPAConfig, predictor_embed_dim=12, predictor_depth=1))
    main(["--step", "vit_tiny", "--batch_size", "2", "--threads", "1", "--rounds", "2"])
    printed = capsys.readouterr().out
    assert 0.1 < float(printed.split("real / synthetic")[1].split()[0]) < 10
    assert "waiting for data" in printed
    assert "sampling masks" in printed
