"""metrics.jsonl: its lines are whole through kills and resumes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastjepa.errors import RunFolderError
from fastjepa.run.metrics_file import MetricsFile

LINE = {"step": 3, "loss": 0.51234, "lr": 1e-3}


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
    """A line that lacks only its newline is dropped too: the next line would be appended to it."""
    path.write_text('{"step": 2}\n' + half)
    write(path, 4, {"step": 6})
    assert steps(path) == [2, 6]


@pytest.mark.parametrize(
    "damaged", [b'{"step": 3, "lo\0\0', b'{"step": 3, "name": "\xff"}', b'{"loss": 3}', b"3", b'{"step": null}', b""]
)
def test_a_damaged_line_is_named_and_removed_alone(
    path: Path, damaged: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path.write_bytes(b'{"step": 2}\n' + damaged + b'\n{"step": 4}\n')
    write(path, 4, {"step": 6})
    assert steps(path) == [2, 4, 6]
    assert f"{path}: line 2 is damaged, and is removed (" in caplog.text


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a file that cannot be written")
def test_a_full_disk_is_an_error_that_names_the_file(path: Path) -> None:
    metrics = MetricsFile(path, 0)
    metrics._file = Path("/dev/full").open("w")  # noqa: SIM115 (closing it would write, and fail)
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl: cannot be written \(No space left on device\)"):
        metrics.write(LINE)
