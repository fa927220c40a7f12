"""What a run reports: lines of metrics.jsonl through kills and resumes, the sums behind them, progress on a terminal."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastjepa.data import Seconds
from fastjepa.errors import RunFolderError
from fastjepa.run.meter import Meter
from fastjepa.run.metrics_file import MetricsFile
from fastjepa.run.progress import Progress

LINE = {"step": 3, "loss": 0.51234, "lr": 1e-3, "images_per_second": 12345.6, "data_wait": 0.126}
FIGURES = re.escape("loss 0.5123  lr 1.00e-03  12,346 images/s  data wait 13%")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def write(path: Path, first_step: int, *lines: dict[str, Any]) -> None:
    metrics = MetricsFile(path, first_step)
    for line in lines:
        metrics.write(line)
    metrics.close()


def test_a_line_can_be_read_as_soon_as_it_is_written(path: Path) -> None:
    metrics = MetricsFile(path, 0)
    metrics.write(LINE)
    assert json.loads(path.read_text()) == LINE
    metrics.close()


def test_a_resumed_run_drops_the_lines_that_it_writes_again(path: Path) -> None:
    write(path, 0, *({"step": step, "run": 1} for step in (2, 4, 6, 8)))
    write(path, 4, {"step": 6, "run": 2})
    assert steps(path) == [2, 4, 6]
    assert [json.loads(line)["run"] for line in path.read_text().splitlines()] == [1, 1, 2]


@pytest.mark.parametrize("half", ['{"step": 4, "lo', '{"step": 4, "nested": {}', '{"step": 4}', "\n"])
def test_a_half_written_last_line_is_dropped(path: Path, half: str) -> None:
    """Also one that lacks nothing but its newline: the next line would be written behind it."""
    path.write_text('{"step": 2}\n' + half)
    write(path, 4, {"step": 6})
    assert steps(path) == [2, 6]


@pytest.mark.parametrize(
    "damaged", [b'{"step": 3, "lo\0\0', b'{"step": 3, "name": "\xff"}', b'{"loss": 3}', b"3", b'{"step": null}', b""]
)
def test_a_damaged_line_is_named_and_costs_no_other(
    path: Path, damaged: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path.write_bytes(b'{"step": 2}\n' + damaged + b'\n{"step": 4}\n')
    write(path, 4, {"step": 6})
    assert steps(path) == [2, 4, 6]
    assert f"{path}: line 2 is damaged and left out (" in caplog.text


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a file that cannot be written")
def test_a_full_disk_is_reported_with_the_file_name(path: Path) -> None:
    metrics = MetricsFile(path, 0)
    metrics._file = Path("/dev/full").open("w")  # noqa: SIM115 (cannot be closed: that would write, too)
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl: cannot be written \(No space left on device\)"):
        metrics.write(LINE)


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


def test_progress_is_plain_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(2, 10, enabled=True)
    progress.advance()
    progress.report(LINE)
    progress.close()
    assert re.fullmatch(rf"step 3/10  {FIGURES}  \d+:\d\d:\d\d left\n", capsys.readouterr().err)


def test_the_time_left_counts_the_steps_of_this_process_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resumed at step 900, 10 steps in 400 s: the other 90 take an hour."""
    clock = 100.0
    monkeypatch.setattr("fastjepa.run.progress.time.perf_counter", lambda: clock)
    progress = Progress(900, 1000, enabled=True)
    clock = 500.0
    progress.report({**LINE, "step": 910})
    assert capsys.readouterr().err.endswith("  1:00:00 left\n")


def test_progress_is_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    progress = Progress(2, 10, enabled=True)
    progress.advance()
    progress.report(LINE)
    progress.close()
    assert re.search(rf"3/10 \[.*{FIGURES}", terminal.getvalue())


def test_all_ranks_but_the_first_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(0, 10, enabled=False)
    progress.advance()
    progress.report(LINE)
    progress.close()
    assert capsys.readouterr() == ("", "")
