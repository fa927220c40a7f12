"""The scan of a source: its splits, images that vanish meanwhile, and Ctrl-C."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fastjepa.data.check.inspector as inspector_module
import fastjepa.data.check.scan as scan_module
from fastjepa.config import DataConfig
from fastjepa.data import ImageDataset, open_dataset
from fastjepa.data.decode.images import EncodedImage
from fastjepa.data.reader import read_image
from tests.support.check_images import PHOTO, encoded, pattern, write

Report = dict[str, Any]


def test_images_that_vanish_during_the_check_are_bad(
    tmp_path: Path, run: Callable[..., tuple[int, Report]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "images", {"1.jpg": PHOTO, "2.jpg": PHOTO})

    def open_and_lose(config: DataConfig, split: Any) -> ImageDataset | None:
        dataset = open_dataset(config, split)
        (folder / "2.jpg").unlink(missing_ok=True)
        return dataset

    monkeypatch.setattr(scan_module, "open_dataset", open_and_lose)
    status, report = run(folder)
    assert status == 1
    assert report["splits"]["train"]["bad"] == [{"index": 1, "name": "2.jpg", "reason": "No such file or directory"}]


def test_only_the_split_that_was_asked_for_is_checked(tmp_path: Path, run: Callable[..., tuple[int, Report]]) -> None:
    folder = write(tmp_path / "images", {"train/1.jpg": b"", "val/2.jpg": PHOTO})
    status, report = run(folder, "--split", "val")
    assert status == 0
    assert list(report["splits"]) == ["val"]
    assert report["in_train_and_val"] is None
    assert run(folder)[0] == 1


def test_ctrl_c_reports_what_was_seen_so_far(
    tmp_path: Path,
    run: Callable[..., tuple[int, Report]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    small = encoded(pattern(1, (4, 4)), "PNG")
    folder = write(tmp_path / "images", {f"train/{i:03}.png": small if i else b"" for i in range(400)})
    write(folder, {"val/1.png": small})

    def read_until(dataset: ImageDataset, index: int, config: DataConfig) -> EncodedImage:
        if index == 100:
            os.kill(os.getpid(), signal.SIGINT)
        return read_image(dataset, index, config)

    monkeypatch.setattr(inspector_module, "read_image", read_until)
    before = signal.getsignal(signal.SIGINT)
    status, report = run(folder, "--num_threads", "1")
    assert status == 130
    assert not report["complete"]
    assert 100 < report["splits"]["train"]["seen"] <= 128  # at most to the end of this chunk
    assert [image["name"] for image in report["splits"]["train"]["bad"]] == ["000.png"]
    assert report["splits"]["val"]["seen"] == 0
    assert signal.getsignal(signal.SIGINT) is before
    text = capsys.readouterr().out
    assert "stopped before the end" in text
    assert "val: 1 image, 0 of them seen" in text
