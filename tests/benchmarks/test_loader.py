"""The loader's benchmark runs in each of its modes, and times nobody whose pixels are wrong."""

from __future__ import annotations

import csv
import dataclasses
import multiprocessing
import time
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from benchmarks.loader import steps
from benchmarks.loader.__main__ import cpu_seconds, main
from benchmarks.loader.contestants import CPU, OURS, RIVALS, Ours, problem_with, random_box
from benchmarks.loader.photographs import make_photographs
from fastjepa.config import ModelConfig

TINY = ["--sizes", "320x240", "--images", "4", "--threads", "1", "--batch_size", "2", "--rounds", "2"]


def test_the_table_has_everybody_who_can_take_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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


@pytest.mark.parametrize("name", [name for name in OURS if not problem_with(name)])
def test_wrong_pixels_are_found(tmp_path: Path, name: str) -> None:
    files = make_photographs(tmp_path / "images", (320, 240), 4)
    with closing(Ours(name, files, 4, 1, CPU)) as ours:
        batch = next(ours._loader)
        assert ours.problem(batch) is None
        problem = ours.problem(dataclasses.replace(batch, boxes=batch.boxes + np.array([0, 0, 4, 4], np.int32)))
    assert problem is not None
    assert problem.startswith("differs from Pillow")


def test_who_is_wrong_is_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Ours, "problem", lambda self: "it is wrong")
    main([*TINY, "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "not timed: fastjepa turbo: 320x240: it is wrong" in printed
    assert "fastjepa" not in (tmp_path / "loader.csv").read_text(encoding="utf-8")


def test_cpu_time_counts_workers_that_live() -> None:
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


def test_random_boxes_are_within_the_limits() -> None:
    for width, height in ((500, 375), (30, 1000), (1000, 30)):
        for _ in range(200):
            top, left, h, w = random_box(width, height)
            assert 0 <= top <= height - h
            assert 0 <= left <= width - w
            assert 0.7 < w / h < 1.4
            assert min(width, height) < 100 or 0.29 < w * h / (width * height) <= 1


def test_memory_is_read_ten_times(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--soak", "20", "--batch_size", "2", "--threads", "1"])
    printed = capsys.readouterr().out
    assert "fastjepa turbo: 20 batches of 2 small images" in printed
    points = printed.split("100 %: ")[1].split(";")[0].split()
    assert len(points) == 10
    assert float(points[0]) > 10


def test_steps_on_real_and_synthetic_images(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = partial(ModelConfig, embed_dim=24, depth=1, num_heads=3, predictor_embed_dim=12, predictor_depth=1)
    monkeypatch.setattr(steps, "ModelConfig", small)
    main(["--step", "vit_tiny", "--batch_size", "2", "--threads", "1", "--rounds", "2"])
    printed = capsys.readouterr().out
    assert 0.1 < float(printed.split("real / synthetic")[1].split()[0]) < 10
    assert "waiting for data" in printed
    assert "sampling masks" in printed
