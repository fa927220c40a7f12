"""Encoded images: what their headers tell, and the promises that every decoder keeps for every kind of file."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastjepa.data.decode.images import read_header
from fastjepa.data.image_errors import BadImage, BadImages
from tests.support.decoding import decode, decode_whole, decoder_for, encoded, random_boxes
from tests.support.image_files import Pixels, png, write_formats


def test_flips_mirror_the_crop(photos: dict[str, Path], loader_name: str) -> None:
    decoder = decoder_for(loader_name, (32, 48), flip=0.5)
    boxes = random_boxes(427, 640, 4)
    plain = decode(decoder, [photos["jpg"]] * 4, boxes)
    mixed = decode(decoder, [photos["jpg"]] * 4, boxes, [True, False, False, True])
    assert torch.equal(mixed[[1, 2]], plain[[1, 2]])
    assert torch.equal(mixed[[0, 3]], plain[[0, 3]].flip(3))


@pytest.mark.parametrize("in_channels", [3, 1])
def test_every_kind_of_file_gives_its_pixels(
    tmp_path: Path, photograph: Pixels, loader_name: str, in_channels: int
) -> None:
    """Lossless files are within one level of 255; JPEG and AVIF are on average. Nothing is rotated, blended or clipped."""
    formats = write_formats(tmp_path, photograph)
    assert len(formats) == 22
    decoder = decoder_for(loader_name, (64, 96), in_channels)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images = decode_whole(decoder, [path for path, _ in formats.values()])
    for image, (name, (path, rgb)) in zip(images, formats.items(), strict=True):
        expected = Image.fromarray(rgb).convert("RGB" if in_channels == 3 else "L")
        difference = (image.permute(1, 2, 0).squeeze().float() - torch.from_numpy(np.array(expected)).float()).abs()
        lossy = path.suffix in (".jpg", ".avif")
        assert (difference.mean() if lossy else difference.max()) < 1.02, name


def test_a_batch_may_be_of_any_size_up_to_the_largest_and_is_never_overwritten(
    tmp_path: Path, loader_name: str
) -> None:
    for value in range(40):
        Image.new("L", (16, 16), value).save(tmp_path / f"{value}.png")
    decoder = decoder_for(loader_name, (8, 8), 1, max_batch=8)
    starts_and_sizes = [(0, 8), (3, 1), (10, 5), (20, 8), (32, 8), (7, 2), (1, 8)] * 3
    batches = [decode_whole(decoder, [tmp_path / f"{v}.png" for v in range(a, a + n)]) for a, n in starts_and_sizes]
    for (start, size), batch in zip(starts_and_sizes, batches, strict=True):
        torch.testing.assert_close(batch.float().mean((1, 2, 3)), torch.arange(start, start + size).float())


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"I am a text that somebody renamed.\n" * 20, "not an image, or damaged in its header"),
        (b"\xff\xd8\xff" + b"x" * 500, "not an image, or damaged in its header"),
        (png(50_000, 50_000, 8, 2, b""), "50000 x 50000 pixels, expected at most data.max_pixels = 1000000"),
    ],
    ids=["text", "no JPEG", "bomb"],
)
def test_an_unusable_header_is_refused_with_the_reason(content: bytes, reason: str) -> None:
    with pytest.raises(BadImage) as caught:
        read_header(content, 1_000_000)
    assert str(caught.value).startswith(reason)


def test_floating_point_pixels_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "x.tif")
    with pytest.raises(BadImage, match="floating-point pixels"):
        encoded(tmp_path / "x.tif", 100)


def test_a_large_image_below_the_limit_is_no_bomb(tmp_path: Path) -> None:
    """Pillow warns above 89 million pixels and raises above 179; only data.max_pixels counts here."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = read_header(png(20_000, 20_000, 1, 0, b""), 400_000_000)
    assert (image.height, image.width) == (20_000, 20_000)


def test_a_thumbnail_or_data_behind_the_image_does_not_hide_or_fake_a_truncation(photos: dict[str, Path]) -> None:
    jpeg = photos["jpg"].read_bytes()
    thumbnail = jpeg[:2] + b"\xff\xe1" + (2 + 3000).to_bytes(2) + (b"\xff\xda..\xff\xd9" * 500) + jpeg[2:]
    for whole in (jpeg, thumbnail, jpeg + b"\0" * 100, jpeg + b"\xff\xda behind \xff\xda", jpeg + jpeg[:500]):
        assert read_header(whole, 10**8).plain_jpeg
    for cut in (jpeg[:-2], jpeg[: len(jpeg) // 2], thumbnail[:-2], thumbnail[: len(jpeg) // 2 + 3000]):
        with pytest.raises(BadImage, match="truncated"):
            read_header(cut, 10**8)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "bmp", "gif"])
def test_truncated_files_are_found_and_the_others_still_decode(
    tmp_path: Path, photograph: Pixels, loader_name: str, suffix: str
) -> None:
    Image.fromarray(photograph[:200, :300]).save(tmp_path / f"good.{suffix}")
    whole = (tmp_path / f"good.{suffix}").read_bytes()
    decoder = decoder_for(loader_name, (32, 32))
    seen_by_header = {"jpg": "truncated", "webp": "damaged in its header"}
    top = np.tile(np.array([[0, 0, 20, 300]], np.int32), (4, 1))  # the damage below counts all the same
    cut = whole[: len(whole) * 2 // 3]
    if suffix in seen_by_header:
        with pytest.raises(BadImage, match=seen_by_header[suffix]):
            read_header(cut, 10**6)
    else:
        mixed = [read_header(data, 10**6) for data in (whole, cut, whole, cut)]
        with pytest.raises(BadImages) as caught:
            decoder.decode(mixed, top, np.zeros(4, bool))
        assert list(caught.value.bad) == [1, 3]
        assert all(caught.value.bad.values())
    good = [read_header(whole, 10**6) for _ in range(2)]
    assert decoder.decode(good, top[:2], np.zeros(2, bool)).shape == (2, 3, 32, 32)


def test_damage_in_a_batch_of_many_formats_is_found_where_it_is(
    tmp_path: Path, photograph: Pixels, loader_name: str
) -> None:
    """DALI leaves some of the formats to the other decoder, and positions must not be confused by that."""
    formats = list(write_formats(tmp_path, photograph))
    at = {name: position for position, name in enumerate(formats)}
    contents = [(tmp_path / name).read_bytes() for name in formats]
    damaged = {"rgb.tif", "grey.png", "rgb.bmp", "palette.gif", "transparent.png"}
    for name in damaged:
        contents[at[name]] = contents[at[name]][: len(contents[at[name]]) * 2 // 3]
    images = [read_header(content, 10**6) for content in contents]
    boxes = np.array([(0, 0, image.height, image.width) for image in images], np.int32)
    with pytest.raises(BadImages) as caught:
        decoder_for(loader_name, (32, 32)).decode(images, boxes, np.zeros(len(images), bool))
    first = {at[name] for name in damaged}
    assert set(caught.value.bad) == first


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_random_damage_raises_no_error_but_bad_image(photograph: Pixels, tmp_path: Path) -> None:
    """Pillow and simplejpeg raise many kinds of errors on damaged files; all must arrive as BadImage."""
    rng = np.random.default_rng(0)
    decoder = decoder_for("turbo", (8, 8))
    found = 0
    for suffix in ("jpg", "png", "webp", "tif", "bmp", "ppm", "jp2", "gif", "avif"):
        Image.fromarray(photograph[:20, :30]).save(tmp_path / f"good.{suffix}")
        whole = np.frombuffer((tmp_path / f"good.{suffix}").read_bytes(), np.uint8)
        for _ in range(40):
            damaged = whole.copy()
            damaged[rng.integers(0, min(len(damaged), 400), 3)] = rng.integers(0, 256, 3)
            try:
                image = read_header(damaged.tobytes(), 10_000)
                decoder.decode([image], np.array([[0, 0, image.height, image.width]], np.int32), np.zeros(1, bool))
            except (BadImage, BadImages):
                found += 1
    assert found > 30
