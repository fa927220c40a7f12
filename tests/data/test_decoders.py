"""Decoders: the same pixels from Pillow, DALI and torch, for every kind of file, and clear words for bad ones."""

import os
import struct
import warnings
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fastjepa.config import DataConfig
from fastjepa.data.images import BadImage, BadImages, Decoder, read_size
from fastjepa.data.loader import choose_decoder
from fastjepa.data.order import central_boxes, crop_boxes

Pixels = npt.NDArray[np.uint8]
CPU = torch.device("cpu")


def decoder_for(loader_name: str, image_size: tuple[int, int], in_channels: int = 3, max_batch: int = 32) -> Decoder:
    """A decoder whose output is x / 255."""
    none, unit = (0.0,) * in_channels, (1.0,) * in_channels
    config = DataConfig(
        image_size=image_size,
        in_channels=in_channels,
        mean=none,
        std=unit,
        loader=loader_name,  # type: ignore[arg-type]
        num_threads=2,
    )
    return choose_decoder(config, CPU, max_batch)


def decode_whole(decoder: Decoder, paths: Sequence[Path | str]) -> Tensor:
    sizes = [read_size(str(path), 10**8) for path in paths]
    boxes = np.array([(0, 0, height, width) for height, width in sizes], np.int32)
    return decoder.decode([str(path) for path in paths], boxes)


def png(width: int, height: int, bit_depth: int, colour_type: int, rows: bytes) -> bytes:
    """A PNG file from its filtered rows (Pillow writes neither 16-bit RGB nor headers without pixels)."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, bit_depth, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def png16(pixels: npt.NDArray[np.uint16]) -> bytes:
    """uint16 [H, W, 1 | 3] as a 16-bit PNG file."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    return png(pixels.shape[1], pixels.shape[0], 16, 0 if pixels.shape[2] == 1 else 2, rows)


@pytest.fixture
def photos(tmp_path: Path, photograph: Pixels) -> dict[str, Path]:
    """The photograph as PNG and JPEG."""
    for suffix in ("png", "jpg"):
        Image.fromarray(photograph).save(tmp_path / f"photo.{suffix}")
    return {suffix: tmp_path / f"photo.{suffix}" for suffix in ("png", "jpg")}


@pytest.mark.parametrize("image_size", [(224, 224), (64, 96)])
def test_pillow_crops_are_antialiased_bilinear(
    photos: dict[str, Path], photograph: Pixels, image_size: tuple[int, int]
) -> None:
    """Against torch's resampling in float: Pillow rounds to a level after either axis, so within one level."""
    sizes = np.tile(np.array([photograph.shape[:2]], np.int32), (8, 1))
    boxes = crop_boxes(DataConfig(), seed=0, epoch=0, indices=np.arange(8), sizes=sizes)
    images = decoder_for("pillow", image_size).decode([str(photos["png"])] * 8, boxes)
    for image, (top, left, height, width) in zip(images, boxes, strict=True):
        crop = torch.from_numpy(photograph[top : top + height, left : left + width].copy()).permute(2, 0, 1)[None]
        expected = F.interpolate(crop.float(), image_size, mode="bilinear", antialias=True)[0]
        assert (255 * image - expected).abs().max() < 1.01


@pytest.mark.parametrize("suffix", ["png", "jpg"])
@pytest.mark.parametrize(("in_channels", "mean_bound"), [(3, 0.2), (1, 0.6)])
def test_dali_agrees_with_pillow(photos: dict[str, Path], suffix: str, in_channels: int, mean_bound: float) -> None:
    """In levels of 255, over random crops: mean below 0.2 in colour, 0.6 in grey.

    Two pixels inside the border no colour differs by more than one; there DALI repeats the border and Pillow shortens
    the filter. A JPEG file's grey differs more in single pixels: DALI takes luma as stored, Pillow computes it from RGB.
    """
    pytest.importorskip("nvidia.dali", reason="needs DALI")
    with Image.open(photos["png"]) as image:
        sizes = np.tile(np.array([(image.height, image.width)], np.int32), (16, 1))
    boxes = crop_boxes(DataConfig(), seed=0, epoch=0, indices=np.arange(16), sizes=sizes)
    boxes[0] = central_boxes(sizes, (224, 224))[0]
    paths = [str(photos[suffix])] * 16
    pillow, dali = (decoder_for(name, (224, 224), in_channels).decode(paths, boxes) for name in ("pillow", "dali"))
    difference = 255 * (dali - pillow).abs()
    assert difference.mean() < mean_bound
    assert difference.max() < 20
    inside = difference[:, :, 2:-2, 2:-2]
    assert inside.max() < (1.01 if in_channels == 3 else 2.01 if suffix == "png" else 20)


def test_values_are_normalised_per_channel(tmp_path: Path, loader_name: str) -> None:
    Image.new("RGB", (20, 10), (255, 51, 0)).save(tmp_path / "x.png")
    config = DataConfig(image_size=(4, 6), mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 0.2), loader=loader_name)  # type: ignore[arg-type]
    images = decode_whole(choose_decoder(config, CPU, 1), [tmp_path / "x.png"])
    assert images.dtype == torch.float32
    assert images.shape == (1, 3, 4, 6)
    torch.testing.assert_close(images.amax((0, 2, 3)), torch.tensor([1.8, 0.0, -1.5]), atol=1e-5, rtol=0)
    torch.testing.assert_close(images.amin((0, 2, 3)), torch.tensor([1.8, 0.0, -1.5]), atol=1e-5, rtol=0)


def write_formats(folder: Path, photograph: Pixels) -> dict[str, tuple[Path, Pixels]]:
    """name -> (file, the RGB pixels that it stands for)."""
    rgb = photograph[100:164, 200:296]
    image = Image.fromarray(rgb)
    grey = image.convert("L")
    grey_rgb = np.asarray(grey.convert("RGB"))
    palette = image.quantize(64)
    noise = np.random.default_rng(0).integers(-127, 128, rgb.shape)  # below one 8-bit level: must not change the level
    rgb16 = (rgb.astype(int) * 257 + noise).clip(0, 65535).astype(np.uint16)
    grey16 = (np.asarray(grey).astype(int) * 257 + noise[..., 0]).clip(0, 65535).astype(np.uint16)
    transparent = image.copy()
    transparent.putalpha(grey)
    grey_alpha = grey.copy()
    grey_alpha.putalpha(Image.new("L", grey.size, 7))
    rotated = Image.Exif()
    rotated[0x0112] = 6
    (folder / "rgb16.png").write_bytes(png16(rgb16))
    (folder / "grey16.png").write_bytes(png16(grey16[..., None]))
    Image.fromarray(grey16).save(folder / "grey16.tif")
    grey.save(folder / "grey.png")
    grey_alpha.save(folder / "grey_alpha.png")
    transparent.save(folder / "transparent.png")
    palette.save(folder / "palette.png")
    palette.save(folder / "palette_transparent.png", transparency=bytes(range(64)))
    image.convert("CMYK").save(folder / "cmyk.jpg", quality=100, subsampling=0)
    image.save(folder / "rotated.jpg", quality=100, subsampling=0, exif=rotated)
    grey.save(folder / "grey.jpg", quality=100)
    for suffix in ("bmp", "ppm", "tif", "jp2"):
        image.save(folder / f"rgb.{suffix}")
    image.save(folder / "rgb.webp", lossless=True)
    meant = {"grey": grey_rgb, "palette": np.asarray(palette.convert("RGB"))}
    files = sorted(folder.iterdir())
    return {
        path.name: (path, next((p for key, p in meant.items() if path.name.startswith(key)), rgb)) for path in files
    }


@pytest.mark.parametrize("in_channels", [3, 1])
def test_every_kind_of_file_gives_its_pixels(
    tmp_path: Path, photograph: Pixels, loader_name: str, in_channels: int
) -> None:
    """Lossless files within one level of 255; JPEG on average within one. Nothing is rotated, blended or clipped."""
    formats = write_formats(tmp_path, photograph)
    assert len(formats) == 16
    decoder = decoder_for(loader_name, (64, 96), in_channels)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images = decode_whole(decoder, [path for path, _ in formats.values()])
    for image, (name, (path, rgb)) in zip(images, formats.items(), strict=True):
        expected = Image.fromarray(rgb).convert("RGB" if in_channels == 3 else "L")
        difference = (255 * image.permute(1, 2, 0).squeeze() - torch.from_numpy(np.array(expected)).float()).abs()
        assert (difference.mean() if path.suffix == ".jpg" else difference.max()) < 1.02, name


def test_a_batch_may_be_of_any_size_up_to_the_largest_and_is_never_overwritten(
    tmp_path: Path, loader_name: str
) -> None:
    for value in range(40):
        Image.new("L", (16, 16), value).save(tmp_path / f"{value}.png")
    decoder = decoder_for(loader_name, (8, 8), 1, max_batch=8)
    starts_and_sizes = [(0, 8), (3, 1), (10, 5), (20, 8), (32, 8), (7, 2), (1, 8)] * 3
    batches = [decode_whole(decoder, [tmp_path / f"{v}.png" for v in range(a, a + n)]) for a, n in starts_and_sizes]
    for (start, size), batch in zip(starts_and_sizes, batches, strict=True):
        torch.testing.assert_close(255 * batch.mean((1, 2, 3)), torch.arange(start, start + size).float())


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty file"),
        (b"I am a text that somebody renamed.\n" * 20, "not an image, or damaged in its header"),
        (png(50_000, 50_000, 8, 2, b""), "50000 x 50000 pixels, expected at most data.max_pixels = 1000000"),
        (None, "No such file or directory"),
    ],
    ids=["zero-byte", "text", "bomb", "missing"],
)
def test_a_header_that_will_not_do_is_named_with_the_reason(tmp_path: Path, content: bytes | None, reason: str) -> None:
    path = tmp_path / "bad.jpg"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BadImage) as caught:
        read_size(str(path), 1_000_000)
    assert str(caught.value) == f"{path}: {reason}"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads every file")
def test_an_unreadable_file_is_named_with_the_reason(tmp_path: Path) -> None:
    Image.new("L", (4, 4)).save(tmp_path / "x.png")
    (tmp_path / "x.png").chmod(0)
    with pytest.raises(BadImage, match=r"x\.png: Permission denied"):
        read_size(str(tmp_path / "x.png"), 100)


def test_floating_point_pixels_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "x.tif")
    with pytest.raises(BadImage, match="floating-point pixels"):
        read_size(str(tmp_path / "x.tif"), 100)


def test_a_large_image_below_the_limit_is_no_bomb(tmp_path: Path) -> None:
    """Pillow warns above 89 million pixels and raises above 179; only data.max_pixels counts here."""
    (tmp_path / "large.png").write_bytes(png(20_000, 20_000, 1, 0, b""))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_size(str(tmp_path / "large.png"), 400_000_000) == (20_000, 20_000)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "bmp"])
def test_truncated_files_are_found_and_the_others_still_decode(
    tmp_path: Path, photograph: Pixels, loader_name: str, suffix: str
) -> None:
    Image.fromarray(photograph[:200, :300]).save(tmp_path / f"good.{suffix}")
    whole = (tmp_path / f"good.{suffix}").read_bytes()
    (tmp_path / f"cut.{suffix}").write_bytes(whole[: len(whole) * 2 // 3])
    good, cut = str(tmp_path / f"good.{suffix}"), str(tmp_path / f"cut.{suffix}")
    boxes = np.tile(np.array([[0, 0, 200, 300]], np.int32), (4, 1))
    decoder = decoder_for(loader_name, (32, 32))
    with pytest.raises(BadImages) as caught:
        decoder.decode([good, cut, good, cut], boxes)
    assert list(caught.value.bad) == [1, 3]
    assert caught.value.bad[1].path == cut
    assert caught.value.bad[1].reason
    assert decoder.decode([good] * 2, boxes[:2]).shape == (2, 3, 32, 32)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_random_damage_is_a_bad_image_or_passes_but_never_another_error(tmp_path: Path, photograph: Pixels) -> None:
    """Pillow's readers raise a zoo of errors on damaged files; all must arrive as BadImage."""
    rng = np.random.default_rng(0)
    decoder = decoder_for("pillow", (8, 8))
    found = 0
    for suffix in ("jpg", "png", "webp", "tif", "bmp", "ppm", "jp2"):
        Image.fromarray(photograph[:20, :30]).save(tmp_path / f"good.{suffix}")
        whole = np.frombuffer((tmp_path / f"good.{suffix}").read_bytes(), np.uint8)
        for _ in range(40):
            damaged = whole.copy()
            damaged[rng.integers(0, min(len(damaged), 400), 3)] = rng.integers(0, 256, 3)
            (tmp_path / f"bad.{suffix}").write_bytes(damaged.tobytes())
            try:
                height, width = read_size(str(tmp_path / f"bad.{suffix}"), 10_000)
                decoder.decode([str(tmp_path / f"bad.{suffix}")], np.array([[0, 0, height, width]], np.int32))
            except (BadImage, BadImages):
                found += 1
    assert found > 20


def test_names_that_are_not_utf8_are_read(
    tmp_path: Path, loader_name: str, write_invalid_name: Callable[[Path, bytes], bytes]
) -> None:
    Image.new("L", (8, 8), 102).save(tmp_path / "x.png")
    path = os.fsdecode(write_invalid_name(tmp_path / "x.png", b"\xff\xfe \xe9.png"))
    images = decode_whole(decoder_for(loader_name, (8, 8), 1), [path])
    torch.testing.assert_close(images, torch.full((1, 1, 8, 8), 0.4))
    assert str(BadImage(path, "why")).encode("utf-8")  # surrogates would not encode


def test_a_channel_count_that_no_file_has_is_refused() -> None:
    config = DataConfig(in_channels=4, mean=(0.0,) * 4, std=(1.0,) * 4)
    with pytest.raises(ValueError, match=r"data\.in_channels = 4: expected 3 \(RGB\) or 1 \(grey\)"):
        choose_decoder(config, CPU, 1)
