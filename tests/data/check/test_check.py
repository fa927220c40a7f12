"""The check before a run: it counts what is there, names what is bad, and calls bad what training replaces."""

import io
import json
import os
import signal
import struct
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import simplejpeg
from PIL import Image

import fastjepa.data.check as check_module
import fastjepa.data.check.tally as tally_module
from fastjepa.config import DataConfig
from fastjepa.data import ImageDataset, open_dataset
from fastjepa.data.bad_samples import BadSamples
from fastjepa.data.check.__main__ import main
from fastjepa.data.check.tally import same_bytes
from fastjepa.data.decode.cpu import TurboDecoder
from fastjepa.data.decode.images import EncodedImage
from fastjepa.data.reader import Reader, read_image

Report = dict[str, Any]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTJEPA_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., tuple[int, Report]]:
    """Runs the command; returns its exit status and the report that it wrote."""

    def run(source: Path, *arguments: str) -> tuple[int, Report]:
        file = tmp_path / "report.json"
        status = main([str(source), "--json", str(file), "--num_threads", "2", *arguments])
        return status, json.loads(file.read_text(encoding="utf-8"))

    return run


def pattern(seed: int, size: tuple[int, int] = (60, 40)) -> Image.Image:
    """A smooth RGB image of width x height, another one for each seed."""
    noise = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(width: int, height: int, bit_depth: int, colour_type: int, rows: bytes) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, bit_depth, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def with_alpha(image: Image.Image) -> Image.Image:
    image = image.copy()
    image.putalpha(77)
    return image


def garbled(jpeg: bytes) -> bytes:
    """Complete, with wrong data in its middle."""
    middle = len(jpeg) // 2
    return jpeg[:middle] + bytes(40) + jpeg[middle + 40 :]


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


PHOTO = encoded(pattern(1, (300, 240)), "JPEG")
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
    assert split["kinds"] == KINDS  # of usable ones


def test_headers_only_counts_the_same_and_finds_what_headers_tell(
    tmp_path: Path, run: Callable[..., tuple[int, Report]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode(*_: object, **__: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(simplejpeg, "decode_jpeg", decode)
    monkeypatch.setattr(TurboDecoder, "decode", decode)
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


def random_damage(folder: Path, count: int) -> Path:
    """Files of many formats with some bytes changed, or cut."""
    rng = np.random.default_rng(0)
    kinds = {
        "jpg": encoded(pattern(1, (90, 60)), "JPEG"),
        "JPG": encoded(pattern(1, (900, 700)), "JPEG", progressive=True),  # decoded at half its size or less
        "jpeg": encoded(pattern(1, (90, 60)).convert("CMYK"), "JPEG"),
        **{suffix: encoded(pattern(1), kind) for suffix, kind in (("png", "PNG"), ("webp", "WEBP"), ("bmp", "BMP"))},
        **{
            suffix: encoded(pattern(1), kind) for suffix, kind in (("jp2", "JPEG2000"), ("tif", "TIFF"), ("ppm", "PPM"))
        },
        "gif": encoded(pattern(1).quantize(16), "GIF"),
    }
    files = {"good.png": kinds["png"]}
    for suffix, content in kinds.items():
        for i in range(count):
            damaged = np.frombuffer(content, np.uint8).copy()
            positions = rng.integers(0, len(damaged) if i % 2 else min(len(damaged), 400), 3)
            damaged[positions] = rng.integers(0, 256, 3)
            files[f"{suffix}-{i:02}.{suffix}"] = damaged.tobytes()[
                : rng.integers(1, len(damaged)) if i % 5 == 0 else None
            ]
    return write(folder, files)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore:Metadata Warning")
def test_bad_is_exactly_what_training_replaces(tmp_path: Path, run: Callable[..., tuple[int, Report]]) -> None:
    folder = random_damage(tmp_path / "images", 20)
    _, report = run(folder)
    config = DataConfig(source=str(folder), num_threads=2)
    dataset = open_dataset(config, "train")
    assert dataset is not None
    file = tmp_path / "bad_samples.jsonl"
    with ThreadPoolExecutor(2) as pool:
        reader = Reader(dataset, config, 0, TurboDecoder(config, pool), pool, BadSamples(dataset, 1.0, file))
        for start in range(0, len(dataset), 20):
            reader.read(np.arange(start, min(start + 20, len(dataset))), epoch=0)
    replaced = [json.loads(line) for line in file.read_text().splitlines()]
    assert 40 < len(replaced) < 160
    assert sorted(replaced, key=lambda image: int(image["index"])) == report["splits"]["train"]["bad"]
    assert len(report["splits"]["train"]["damaged"]) > 5


@pytest.mark.parametrize(
    ("num_good", "verdict"),
    [
        (1, "bad           1 (50%): TRAINING WOULD STOP, as they are more than data.max_bad_share = 0.01"),
        (
            99,
            "bad           1 (1%): training would put others in their places (up to data.max_bad_share = 0.01)",
        ),
    ],
)
def test_it_says_what_training_would_do(
    tmp_path: Path,
    run: Callable[..., tuple[int, Report]],
    capsys: pytest.CaptureFixture[str],
    num_good: int,
    verdict: str,
) -> None:
    small = encoded(pattern(1, (4, 4)), "PNG")
    run(write(tmp_path / "images", {f"{i:02}.png": small for i in range(num_good)} | {"bad.png": b""}))
    assert verdict in capsys.readouterr().out


def test_images_that_vanish_during_the_check_are_bad(
    tmp_path: Path, run: Callable[..., tuple[int, Report]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "images", {"1.jpg": PHOTO, "2.jpg": PHOTO})

    def open_and_lose(config: DataConfig, split: Any) -> ImageDataset | None:
        dataset = open_dataset(config, split)
        (folder / "2.jpg").unlink(missing_ok=True)
        return dataset

    monkeypatch.setattr(check_module, "open_dataset", open_and_lose)
    status, report = run(folder)
    assert status == 1
    assert report["splits"]["train"]["bad"] == [{"index": 1, "name": "2.jpg", "reason": "No such file or directory"}]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads every file")
def test_unreadable_images_are_bad(tmp_path: Path, run: Callable[..., tuple[int, Report]]) -> None:
    folder = write(tmp_path / "images", {"1.jpg": PHOTO, "2.jpg": PHOTO})
    (folder / "2.jpg").chmod(0)
    _, report = run(folder)
    assert report["splits"]["train"]["bad"] == [{"index": 1, "name": "2.jpg", "reason": "Permission denied"}]


# Duplicates


def test_duplicates_are_found_within_a_split_and_across(
    tmp_path: Path, run: Callable[..., tuple[int, Report]], capsys: pytest.CaptureFixture[str]
) -> None:
    one, two, three, four = (encoded(pattern(seed), "PNG") for seed in range(4))
    files = {"train/x/1.png": one, "train/x/2.png": two, "train/x/3.png": one, "train/y/4.png": one}
    files |= {"train/y/5.png": three, "train/y/6.png": three, "train/y/7.png": b"", "train/y/8.png": b""}
    files |= {"val/x/9.png": three, "val/x/10.png": four, "val/z/11.png": two, "val/z/12.png": two}
    _, report = run(write(tmp_path / "images", files))
    assert report["splits"]["train"]["duplicates"] == {
        "groups": 2,
        "surplus": 3,
        "groups_of_several_labels": 1,
        "named": [["x/1.png", "x/3.png", "y/4.png"], ["y/5.png", "y/6.png"]],
    }
    assert report["splits"]["val"]["duplicates"] == {
        "groups": 1,
        "surplus": 1,
        "groups_of_several_labels": 0,
        "named": [["z/11.png", "z/12.png"]],
    }
    assert report["in_train_and_val"] == {
        "groups": 2,
        "val_images": 3,
        "named": [
            {"train": ["x/2.png"], "val": ["z/11.png", "z/12.png"]},
            {"train": ["y/5.png", "y/6.png"], "val": ["x/9.png"]},
        ],
    }
    assert report["splits"]["val"]["classes"]["not_in_train"] == ["z"]
    text = capsys.readouterr().out
    assert "in val and in train: 3 (75%) of val's images, byte for byte" in text
    assert "      val: z/11.png = val: z/12.png = train: x/2.png" in text
    assert "duplicates    2 groups with the same bytes, 3 images too many; 1 group under different labels" in text


@pytest.mark.parametrize("n", [0, 1, 2, 50, 300])
def test_images_of_the_same_bytes_are_grouped_as_a_dictionary_would(n: int) -> None:
    rng = np.random.default_rng(n)
    digests: npt.NDArray[np.uint64] = rng.integers(0, 12, (n, 2)).astype(np.uint64)
    expected: dict[tuple[int, ...], list[int]] = {}
    for position, digest in enumerate(digests.tolist()):
        expected.setdefault(tuple(digest), []).append(position)
    order, starts, ends = same_bytes(digests)
    found = [order[start:end].tolist() for start, end in zip(starts, ends, strict=True)]
    assert found == [group for group in expected.values() if len(group) > 1]
    assert sorted(order) == list(range(n))


# The command


def test_one_split_can_be_asked_for(tmp_path: Path, run: Callable[..., tuple[int, Report]]) -> None:
    folder = write(tmp_path / "images", {"train/1.jpg": b"", "val/2.jpg": PHOTO})
    status, report = run(folder, "--split", "val")
    assert status == 0
    assert list(report["splits"]) == ["val"]
    assert report["in_train_and_val"] is None
    assert run(folder)[0] == 1


@pytest.mark.parametrize("arguments", [["--num_threads", "1"], ["--num_threads", "5", "--max_pixels", "5000"]])
def test_settings_reach_the_check(tmp_path: Path, run: Callable[..., tuple[int, Report]], arguments: list[str]) -> None:
    status, report = run(write(tmp_path / "images", {f"{i}.jpg": PHOTO for i in range(9)}), *arguments)
    assert len(report["splits"]["train"]["bad"]) == (9 if "--max_pixels" in arguments else 0)
    assert status == ("--max_pixels" in arguments)
    assert report["num_threads"] == int(arguments[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{folder}/nowhere"], "fastjepa: error: data.source = {folder}/nowhere: No such file or folder"),
        (["{folder}", "--split", "val"], "fastjepa: error: data.source = {folder}: it has no split val"),
        (["{folder}", "--max_pixels", "0"], "fastjepa: error: data.max_pixels = 0: expected a positive number"),
        (["{folder}", "--json", "{folder}/no/x.json"], "fastjepa: error: --json {folder}/no/x.json: cannot be written"),
    ],
)
def test_errors_are_named_without_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    write(tmp_path, {"1.jpg": PHOTO})
    assert main([argument.format(folder=tmp_path) for argument in arguments]) == 2
    output = capsys.readouterr()
    assert output.err.startswith(message.format(folder=tmp_path))
    assert output.out == ""


def test_names_in_the_report_are_few_and_in_the_json_all(
    tmp_path: Path, run: Callable[..., tuple[int, Report]], capsys: pytest.CaptureFixture[str]
) -> None:
    files = {f"bad{i:02}.png": b"text" for i in range(25)} | {"good.jpg": PHOTO}
    _, report = run(write(tmp_path / "images", files))
    assert len(report["splits"]["train"]["bad"]) == 25
    output = capsys.readouterr()
    assert output.out.count(".png: not an image") == 10
    assert "... and 15 more (--json FILE names them)" in output.out
    assert "%|" not in output.err  # no bar where there is no terminal


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

    monkeypatch.setattr(tally_module, "read_image", read_until)
    before = signal.getsignal(signal.SIGINT)
    status, report = run(folder, "--num_threads", "1")
    assert status == 130
    assert not report["complete"]
    assert 100 < report["splits"]["train"]["seen"] <= 128  # to the end of this chunk, at most
    assert [image["name"] for image in report["splits"]["train"]["bad"]] == ["000.png"]
    assert report["splits"]["val"]["seen"] == 0
    assert signal.getsignal(signal.SIGINT) is before
    text = capsys.readouterr().out
    assert "stopped before the end" in text
    assert "val: 1 image, 0 of them seen" in text


def test_an_unexpected_error_names_the_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> EncodedImage:
        raise ZeroDivisionError

    monkeypatch.setattr(tally_module, "read_image", broken)
    with pytest.raises(ZeroDivisionError) as caught:
        main([str(write(tmp_path, {"1.jpg": PHOTO}))])
    assert caught.value.__notes__ == ["while looking at 1.jpg, which would end a run in the same way"]
