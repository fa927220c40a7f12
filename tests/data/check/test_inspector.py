"""The inspector knows every kind of image, and calls bad exactly what training would replace."""

import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
from PIL import Image

import fastjepa.data.check.inspector as inspector_module
from fastjepa.config import DataConfig
from fastjepa.data import open_dataset
from fastjepa.data.bad_samples import BadSamples
from fastjepa.data.check.__main__ import main
from fastjepa.data.decode.cpu import CPUDecoder
from fastjepa.data.decode.images import EncodedImage
from fastjepa.data.reader import Reader, ViewDecoder
from tests.support.check_images import PHOTO, encoded, garbled, pattern, random_damage, turned, with_alpha, write
from tests.support.image_files import png

Report = dict[str, Any]


GOOD = {
    "a/colour.jpg": PHOTO,
    "a/progressive.jpg": encoded(pattern(2, (400, 250)), "JPEG", progressive=True),
    "a/grey.jpg": encoded(pattern(3).convert("L"), "JPEG"),
    "a/cmyk.jpg": encoded(pattern(4).convert("CMYK"), "JPEG"),
    "a/turned.jpg": encoded(pattern(5), "JPEG", exif=turned()),
    "a/upright.jpg": encoded(pattern(6), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0"),
    "b/turned.png": encoded(pattern(7), "PNG", exif=turned()),
    "b/turned.webp": encoded(pattern(8), "WEBP", exif=turned()),
    "b/palette.png": encoded(pattern(9).quantize(16), "PNG"),
    "b/alpha.png": encoded(with_alpha(pattern(10)), "PNG"),
    "b/grey_alpha.png": encoded(with_alpha(pattern(11).convert("L")), "PNG"),
    "b/grey16.png": png(8, 8, 16, 0, (b"\0" + bytes(16)) * 8),
    "b/rgb16.png": png(8, 8, 16, 2, (b"\0" + bytes(48)) * 8),
    "b/grey16.tif": encoded(Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8)), "TIFF"),
    "b/animated.gif": encoded(pattern(12).quantize(16), "GIF", save_all=True, append_images=[pattern(13).quantize(16)]),
    "b/still.bmp": encoded(pattern(14, (4, 3)), "BMP"),
}


KINDS = {
    "JPEG RGB": 4,
    "JPEG grey": 1,
    "JPEG CMYK": 1,
    "PNG RGB": 1,
    "WEBP RGB": 1,
    "PNG palette": 1,
    "PNG RGB with alpha": 1,
    "PNG grey with alpha": 1,
    "PNG 16-bit grey": 1,
    "PNG 16-bit RGB": 1,
    "TIFF 16-bit grey": 1,
    "GIF palette": 1,
    "BMP RGB": 1,
}


BAD_BY_HEADER = {
    "c/bomb.png": (png(50_000, 50_000, 8, 2, b""), "50000 x 50000 pixels, expected at most data.max_pixels"),
    "c/empty.jpg": (b"", "empty file"),
    "c/float.tif": (encoded(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"), "floating-point pixels"),
    "c/text.jpg": (b"I am a text that somebody renamed.\n" * 20, "not an image, or damaged in its header"),
    "c/truncated.jpg": (PHOTO[: len(PHOTO) // 2], "truncated: the JPEG file has no end"),
}


BAD_BY_PIXELS = {"c/truncated.png": (encoded(pattern(15), "PNG")[:900], "image file is truncated")}


def test_every_kind_of_image_is_counted(tmp_path: Path, run: Callable[..., tuple[int, Report]]) -> None:
    status, report = run(write(tmp_path / "images", GOOD))
    split = report["splits"]["train"]
    assert status == 0
    assert report["complete"]
    assert report["images"] == split["images"] == split["seen"] == split["usable"] == len(GOOD)
    assert split["kinds"] == KINDS
    assert split["bytes"] == sum(map(len, GOOD.values()))
    assert (split["animated"], split["rotated"]) == (1, 3)
    assert split["bad"] == split["damaged"] == split["duplicates"]["named"] == []
    assert split["classes"] == {
        "count": 2,
        "smallest": {"name": "a", "images": 6},
        "largest": {"name": "b", "images": 10},
        "not_in_train": [],
    }
    assert split["sizes"] == {
        "smallest": {"width": 4, "height": 3, "name": "b/still.bmp"},
        "median": {"width": 60, "height": 40},
        "largest": {"width": 400, "height": 250, "name": "a/progressive.jpg"},
        "a_side_below": {"pixels": 224, "images": 14},
    }
    largest = max(GOOD, key=lambda name: len(GOOD[name]))
    assert split["largest_file"] == {"bytes": len(GOOD[largest]), "name": largest}
    assert report["training_cpu_seconds_per_image"] > 0


def test_bad_images_are_named_with_the_reason(tmp_path: Path, run: Callable[..., tuple[int, Report]]) -> None:
    bad = BAD_BY_HEADER | BAD_BY_PIXELS
    folder = write(tmp_path / "images", GOOD | {name: content for name, (content, _) in bad.items()})
    status, report = run(folder)
    split = report["splits"]["train"]
    assert status == 1
    assert [image["name"] for image in split["bad"]] == sorted(bad)
    assert all(bad[image["name"]][1] in image["reason"] for image in split["bad"])
    assert [image["index"] for image in split["bad"]] == list(range(len(GOOD), len(GOOD) + len(bad)))
    assert split["usable"] == len(GOOD)
    assert split["kinds"] == KINDS  # only usable images are counted


def test_headers_only_counts_the_same_and_finds_what_headers_tell(
    tmp_path: Path, run: Callable[..., tuple[int, Report]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode(*_: object, **__: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(simplejpeg, "decode_jpeg", decode)
    monkeypatch.setattr(CPUDecoder, "decode", decode)
    files = GOOD | {name: content for name, (content, _) in (BAD_BY_HEADER | BAD_BY_PIXELS).items()}
    status, report = run(write(tmp_path / "images", files), "--headers")
    split = report["splits"]["train"]
    assert status == 1
    assert [image["name"] for image in split["bad"]] == sorted(BAD_BY_HEADER)
    assert split["usable"] == len(GOOD) + len(BAD_BY_PIXELS)
    assert split["kinds"] == KINDS | {"PNG RGB": 2}
    assert (split["animated"], split["rotated"]) == (1, 3)
    assert report["training_cpu_seconds_per_image"] is None


def test_damage_that_training_would_not_notice_is_told_apart_from_bad(
    tmp_path: Path, run: Callable[..., tuple[int, Report]], capsys: pytest.CaptureFixture[str]
) -> None:
    status, report = run(write(tmp_path / "images", {"good.jpg": PHOTO, "garbled.jpg": garbled(PHOTO)}))
    split = report["splits"]["train"]
    assert status == 0
    assert [image["name"] for image in split["damaged"]] == ["garbled.jpg"]
    assert split["bad"] == []
    assert split["usable"] == 2
    assert "damaged       1 (50%), but training would use what can be decoded:" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore:Metadata Warning")
def test_bad_is_exactly_what_training_replaces(tmp_path: Path, run: Callable[..., tuple[int, Report]]) -> None:
    folder = random_damage(tmp_path / "images", 20)
    _, report = run(folder)
    config = DataConfig(source=str(folder), num_threads=2)
    dataset = open_dataset(config, "train")
    assert dataset is not None
    file = tmp_path / "bad_samples.jsonl"
    with ThreadPoolExecutor(2) as pool:
        view = ViewDecoder(config, CPUDecoder(config, pool))
        reader = Reader(dataset, [view], 0, pool, BadSamples(dataset, 1.0, file))
        for start in range(0, len(dataset), 20):
            reader.read(np.arange(start, min(start + 20, len(dataset))), epoch=0)
    replaced = [json.loads(line) for line in file.read_text().splitlines()]
    assert 40 < len(replaced) < 160
    assert sorted(replaced, key=lambda image: int(image["index"])) == report["splits"]["train"]["bad"]
    assert len(report["splits"]["train"]["damaged"]) > 5


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads every file")
def test_unreadable_images_are_bad(tmp_path: Path, run: Callable[..., tuple[int, Report]]) -> None:
    folder = write(tmp_path / "images", {"1.jpg": PHOTO, "2.jpg": PHOTO})
    (folder / "2.jpg").chmod(0)
    _, report = run(folder)
    assert report["splits"]["train"]["bad"] == [{"index": 1, "name": "2.jpg", "reason": "Permission denied"}]


def test_an_unexpected_error_names_the_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> EncodedImage:
        raise ZeroDivisionError

    monkeypatch.setattr(inspector_module, "read_image", broken)
    with pytest.raises(ZeroDivisionError) as caught:
        main([str(write(tmp_path, {"1.jpg": PHOTO}))])
    assert caught.value.__notes__ == ["while looking at 1.jpg, which would end a run in the same way"]
