"""What a run reports: lines of metrics.jsonl through kills and resumes, the sums behind them, progress on a terminal."""

from __future__ import annotations

import pytest
import torch

from fastjepa.data import Seconds
from fastjepa.run.meter import Meter


def test_a_meter_averages_since_its_last_summary(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 90.0
    monkeypatch.setattr("fastjepa.run.meter.time.perf_counter", lambda: clock)
    meter = Meter(torch.device("cpu"))
    meter.update(torch.tensor(9.0), images=1000, context_tokens=1000, target_tokens=1000)
    clock = 100.0
    meter.summary()
    meter.update(torch.tensor(0.5), images=4, context_tokens=30, target_tokens=50)
    meter.update(torch.tensor(0.25), images=4, context_tokens=50, target_tokens=30)
    meter.update_data(0.25, Seconds(read=0.1, decode=0.2, to_device=0.0, masks=0.01))
    meter.update_data(0.75, Seconds(read=0.3, decode=0.4, to_device=0.02, masks=0.03))
    clock = 104.0
    summary = {key: round(value, 9) for key, value in meter.summary().items() if value is not None}
    assert 0 < summary.pop("memory_gib") < 1024
    assert summary == {
        "loss": 0.375,
        "images_per_second": 2.0,
        "tokens_per_second": 40.0,
        "data_wait": 0.25,
        "read_ms": 200.0,
        "decode_ms": 300.0,
        "to_device_ms": 10.0,
        "masks_ms": 20.0,
        "context_tokens": 10.0,
        "target_tokens": 10.0,
    }
