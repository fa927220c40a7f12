"""benchmarks.loader times only contestants whose pixels are right."""

from __future__ import annotations

import csv
import multiprocessing
import time
from pathlib import Path

import pytest

from benchmarks.loader.__main__ import cpu_seconds, main
from benchmarks.loader.contestants import OURS, RIVALS, Ours, problem_with

pytestmark = pytest.mark.processes

TINY = ["--sizes", "320x240", "--images", "4", "--threads", "1", "--batch_size", "2", "--rounds", "2"]


def test_the_table_has_every_contestant_that_can_take_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([*TINY, "--output", str(tmp_path)])
    with (tmp_path / "loader.csv").open(encoding="utf-8") as file:
        rows = {row["provider"]: row for row in csv.DictReader(file)}
    absent = {name for name in OURS if problem_with(name)}
    assert set(rows) == {*RIVALS, *OURS} - absent
    for name, row in rows.items():
        assert float(row["cpu_ms_per_image"]) > 0
        assert float(row["images_per_s_p20"]) <= float(row["images_per_s"]) <= float(row["images_per_s_p80"])
        assert (float(row["masks_share"]) > 0) == (name in OURS)
        assert (row["image_size"], row["threads"], row["batch"], row["rounds"]) == ("320x240", "1", "2", "2")
        assert row["torch"]
    assert float(rows["DataLoader + Pillow"]["dataloader_over_this"]) == 1
    assert (tmp_path / "loader.png").stat().st_size > 0
    printed = capsys.readouterr().out
    for name in absent:
        assert f"not timed: {name}: " in printed


def test_contestants_with_wrong_pixels_are_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Ours, "problem", lambda self: "it is wrong")
    main([*TINY, "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "not timed: fastjepa turbo: 320x240: it is wrong" in printed
    assert "fastjepa" not in (tmp_path / "loader.csv").read_text(encoding="utf-8")


def test_cpu_time_counts_living_workers() -> None:
    context = multiprocessing.get_context("fork")
    has_worked, end = context.Event(), context.Event()

    def work() -> None:
        while time.process_time() < 0.2:
            pass
        has_worked.set()
        end.wait()

    before, mine = cpu_seconds(), time.process_time()
    worker = context.Process(target=work)
    worker.start()
    has_worked.wait()
    assert cpu_seconds() - before >= 0.2 + time.process_time() - mine - 0.01
    end.set()
    worker.join()
