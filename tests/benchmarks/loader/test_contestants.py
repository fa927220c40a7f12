"""The contestants of benchmarks.loader: their pixels are checked, and their boxes are those of RandomResizedCrop."""

from __future__ import annotations

import dataclasses
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from benchmarks.loader.contestants import CPU, OURS, Ours, problem_with, random_box
from benchmarks.loader.photographs import make_photographs


@pytest.mark.parametrize("name", [name for name in OURS if not problem_with(name)])
def test_wrong_pixels_are_found(tmp_path: Path, name: str) -> None:
    files = make_photographs(tmp_path / "images", (320, 240), 4)
    with closing(Ours(name, files, 4, 1, CPU)) as ours:
        batch = next(ours._loader)
        assert ours.problem(batch) is None
        (boxes,) = batch.boxes
        problem = ours.problem(dataclasses.replace(batch, boxes=(boxes + np.array([0, 0, 4, 4], np.int32),)))
    assert problem is not None
    assert problem.startswith("differs from Pillow")


def test_random_boxes_are_within_the_image_and_the_limits() -> None:
    for width, height in ((500, 375), (30, 1000), (1000, 30)):
        for _ in range(200):
            top, left, h, w = random_box(width, height)
            assert 0 <= top <= height - h
            assert 0 <= left <= width - w
            assert 0.7 < w / h < 1.4
            assert min(width, height) < 100 or 0.29 < w * h / (width * height) <= 1
