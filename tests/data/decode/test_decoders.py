"""Decoders: the same pixels from libjpeg-turbo, Pillow, DALI and torch, for every kind of file; clear words for bad ones."""

import errno
import os
import struct
import warnings
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fastjepa.config import DataConfig
from fastjepa.data.dataset import ImageDataset, Strings
from fastjepa.data.decode.choice import choose_decoder
from fastjepa.data.decode.images import BadImage, BadImages, Decoder, EncodedImage, read_header
from fastjepa.data.order import central_boxes, crop_boxes, dct_scale

Pixels = npt.NDArray[np.uint8]
CPU = torch.device("cpu")


def decoder_for(
    loader_name: str, image_size: tuple[int, int], in_channels: int = 3, max_batch: int = 32, **settings: object
) -> Decoder:
    config = DataConfig(
        image_size=image_size,
        in_channels=in_channels,
        mean=(0.0,) * in_channels,
        std=(1.0,) * in_channels,
        loader=loader_name,  # type: ignore[arg-type]
        num_threads=2,
        **settings,  # type: ignore[arg-type]
    )
    return choose_decoder(config, CPU, max_batch, ThreadPoolExecutor(2))


def encoded(path: Path | str, max_pixels: int = 10**8) -> EncodedImage:
    return read_header(Path(path).read_bytes(), max_pixels)


def decode(
    decoder: Decoder, paths: Sequence[Path | str], boxes: npt.NDArray[np.int32], flips: Sequence[bool] | None = None
) -> Tensor:
    return decoder.decode([encoded(path) for path in paths], boxes, np.array(flips or [False] * len(paths)))


def decode_whole(decoder: Decoder, paths: Sequence[Path | str]) -> Tensor:
    images = [encoded(path) for path in paths]
    return decode(decoder, paths, np.array([(0, 0, image.height, image.width) for image in images], np.int32))


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


def random_boxes(
    height: int, width: int, count: int, image_size: tuple[int, int] = (224, 224)
) -> npt.NDArray[np.int32]:
    sizes = np.tile(np.array([(height, width)], np.int32), (count, 1))
    config = DataConfig(image_size=image_size)
    return crop_boxes(config, seed=0, epoch=0, indices=np.arange(count), sizes=sizes)


def resized_by_pillow(path: Path, boxes: npt.NDArray[np.int32], image_size: tuple[int, int]) -> Tensor:
    """What torchvision's RandomResizedCrop makes of a PIL image, given the boxes: int [B, C, H, W]."""
    with Image.open(path) as image:
        crops = [image.convert("RGB").crop((left, top, left + w, top + h)) for top, left, h, w in boxes.tolist()]
    resized = [np.asarray(crop.resize(image_size[::-1], Image.Resampling.BILINEAR)) for crop in crops]
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).int()


@pytest.mark.parametrize("suffix", ["png", "jpg"])
@pytest.mark.parametrize("image_size", [(224, 224), (64, 96)])
def test_turbo_gives_the_pixels_of_pillow_within_one_level(
    photos: dict[str, Path], photograph: Pixels, suffix: str, image_size: tuple[int, int]
) -> None:
    boxes = random_boxes(photograph.shape[0], photograph.shape[1], 8)
    images = decode(decoder_for("turbo", image_size, dct_scaling=False), [photos[suffix]] * 8, boxes)
    assert (images.int() - resized_by_pillow(photos[suffix], boxes, image_size)).abs().max() <= 1


def test_turbo_crops_are_antialiased_bilinear(photos: dict[str, Path], photograph: Pixels) -> None:
    """Against torch's resampling in float: after either axis there is rounding to a level, so within 1.5 levels."""
    boxes = random_boxes(photograph.shape[0], photograph.shape[1], 8)
    images = decode(decoder_for("turbo", (96, 64)), [photos["png"]] * 8, boxes)
    for image, (top, left, height, width) in zip(images, boxes, strict=True):
        crop = torch.from_numpy(photograph[top : top + height, left : left + width].copy()).permute(2, 0, 1)[None]
        expected = F.interpolate(crop.float(), (96, 64), mode="bilinear", antialias=True)[0]
        assert (image - expected).abs().max() < 1.5


@pytest.mark.parametrize(("enlarged", "scale"), [(3, 2), (6, 4), (11, 8)])
@pytest.mark.parametrize("in_channels", [3, 1])
def test_dct_scaling_keeps_the_pixels_within_a_level_on_average(
    tmp_path: Path, photograph: Pixels, enlarged: int, scale: int, in_channels: int
) -> None:
    """Large JPEG files, of an enlarged photograph with noise, decoded at 1/2, 1/4 and 1/8: within
    0.5 levels of 255 at 1/2, 0.65 below."""
    height, width = (enlarged * size // 2 for size in photograph.shape[:2])
    large = np.asarray(Image.fromarray(photograph).resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    large += np.random.default_rng(0).normal(0, 4, large.shape).round().astype(int)
    Image.fromarray(large.clip(0, 255).astype(np.uint8)).save(tmp_path / "large.jpg", quality=92)
    size, paths, boxes = (112, 128), [tmp_path / "large.jpg"] * 8, random_boxes(height, width, 8, (112, 128))
    scaled, exact = (
        decode(decoder_for("turbo", size, in_channels, dct_scaling=on), paths, boxes).float() for on in (True, False)
    )
    used_scales = dct_scale(DataConfig(image_size=size), *boxes[:, 2:].T).tolist()
    assert max(used_scales) == scale
    difference = (scaled - exact).abs().mean((1, 2, 3))
    assert difference.max() < (0.5 if max(used_scales) == 2 else 0.65)
    assert [bool(d > 0) for d in difference] == [k > 1 for k in used_scales]


@pytest.mark.parametrize("suffix", ["png", "jpg"])
@pytest.mark.parametrize(("in_channels", "mean_bound"), [(3, 0.3), (1, 0.7)])
def test_dali_agrees_with_turbo(photos: dict[str, Path], suffix: str, in_channels: int, mean_bound: float) -> None:
    """In levels of 255, over random crops: mean below 0.3 in colour, 0.7 in grey.

    Two pixels inside the border no colour differs by more than two, of rounding; at the border DALI repeats it and Pillow
    shortens the filter. A PNG file's grey differs by the rounding of its weights.
    """
    pytest.importorskip("nvidia.dali", reason="needs DALI")
    boxes = random_boxes(427, 640, 16)
    boxes[0] = central_boxes(DataConfig(), np.array([[427, 640]], np.int32))[0]
    turbo, dali = (
        decode(decoder_for(name, (224, 224), in_channels), [photos[suffix]] * 16, boxes).float()
        for name in ("turbo", "dali")
    )
    difference = (dali - turbo).abs()
    assert difference.mean() < mean_bound
    assert difference.max() < 20
    assert difference[:, :, 2:-2, 2:-2].max() <= 2


def test_flips_mirror_the_crop(photos: dict[str, Path], loader_name: str) -> None:
    decoder = decoder_for(loader_name, (32, 48), flip=0.5)
    boxes = random_boxes(427, 640, 4)
    plain = decode(decoder, [photos["jpg"]] * 4, boxes)
    mixed = decode(decoder, [photos["jpg"]] * 4, boxes, [True, False, False, True])
    assert torch.equal(mixed[[1, 2]], plain[[1, 2]])
    assert torch.equal(mixed[[0, 3]], plain[[0, 3]].flip(3))


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
    later = [Image.new("RGB", image.size, colour) for colour in ("red", "blue")]
    (folder / "rgb16.png").write_bytes(png16(rgb16))
    (folder / "grey16.png").write_bytes(png16(grey16[..., None]))
    Image.fromarray(grey16).save(folder / "grey16.tif")
    grey.save(folder / "grey.png")
    grey_alpha.save(folder / "grey_alpha.png")
    transparent.save(folder / "transparent.png")
    palette.save(folder / "palette.png")
    palette.save(folder / "palette_transparent.png", transparency=bytes(range(64)))
    palette.save(folder / "palette_animated.gif", save_all=True, append_images=[frame.quantize(4) for frame in later])
    palette.save(folder / "palette.gif")
    image.save(folder / "animated.webp", save_all=True, append_images=later, lossless=True)
    image.save(folder / "animated.png", save_all=True, append_images=later)
    image.save(folder / "rgb.avif", quality=100, subsampling="4:4:4")
    image.convert("CMYK").save(folder / "cmyk.jpg", quality=100, subsampling=0)
    image.save(folder / "rotated.jpg", quality=100, subsampling=0, exif=rotated)
    image.save(folder / "progressive.jpg", quality=100, subsampling=0, progressive=True)
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
    """Lossless files within one level of 255; JPEG, AVIF on average within one. Nothing is rotated, blended or clipped."""
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


# Headers


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"I am a text that somebody renamed.\n" * 20, "not an image, or damaged in its header"),
        (b"\xff\xd8\xff" + b"x" * 500, "not an image, or damaged in its header"),
        (png(50_000, 50_000, 8, 2, b""), "50000 x 50000 pixels, expected at most data.max_pixels = 1000000"),
    ],
    ids=["text", "no JPEG", "bomb"],
)
def test_a_header_that_will_not_do_is_refused_with_the_reason(content: bytes, reason: str) -> None:
    with pytest.raises(BadImage) as caught:
        read_header(content, 1_000_000)
    assert str(caught.value).startswith(reason)


def file_dataset(path: Path) -> ImageDataset:
    return ImageDataset(str(path.parent), Strings.of([os.fsencode(path.name)]), None, ())


def test_a_file_that_cannot_be_read_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(BadImage, match=r"^No such file or directory$"):
        file_dataset(tmp_path / "missing.jpg").read(0, 100)
    (tmp_path / "empty.jpg").touch()
    with pytest.raises(BadImage, match=r"^empty file$"):
        file_dataset(tmp_path / "empty.jpg").read(0, 100)
    (tmp_path / "huge.jpg").write_bytes(b"x" * 101)
    with pytest.raises(BadImage, match=r"^101 bytes, expected at most 100"):
        file_dataset(tmp_path / "huge.jpg").read(0, 100)
    os.mkfifo(tmp_path / "pipe.jpg")
    for no_file in (tmp_path, tmp_path / "pipe.jpg"):
        with pytest.raises(BadImage, match=r"^not a regular file$"):
            file_dataset(no_file).read(0, 10**9)


def test_errors_that_pass_are_no_image_s_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network file system that fails twice, and then for good; and reads that give less than was asked for."""
    (tmp_path / "x.jpg").write_bytes(b"0123456789")
    monkeypatch.setattr("fastjepa.data.dataset._PAUSE", 0)
    pread, failures = os.pread, [errno.EIO, errno.ESTALE]

    def fail(descriptor: int, size: int, offset: int) -> bytes:
        if failures:
            number = failures.pop()
            raise OSError(number, os.strerror(number))
        return pread(descriptor, min(size, 3), offset)

    monkeypatch.setattr(os, "pread", fail)
    assert file_dataset(tmp_path / "x.jpg").read(0, 100) == b"0123456789"
    failures += [errno.EIO] * 3
    with pytest.raises(BadImage, match="Input/output error"):
        file_dataset(tmp_path / "x.jpg").read(0, 100)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads every file")
def test_an_unreadable_file_is_refused_with_the_reason(tmp_path: Path) -> None:
    Image.new("L", (4, 4)).save(tmp_path / "x.png")
    (tmp_path / "x.png").chmod(0)
    with pytest.raises(BadImage, match=r"^Permission denied$"):
        file_dataset(tmp_path / "x.png").read(0, 100)


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


# Damage


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "bmp", "gif"])
def test_truncated_files_are_found_and_the_others_still_decode(
    tmp_path: Path, photograph: Pixels, loader_name: str, suffix: str
) -> None:
    Image.fromarray(photograph[:200, :300]).save(tmp_path / f"good.{suffix}")
    whole = (tmp_path / f"good.{suffix}").read_bytes()
    decoder = decoder_for(loader_name, (32, 32))
    seen_by_header = {"jpg": "truncated", "webp": "damaged in its header"}
    top = np.tile(np.array([[0, 0, 20, 300]], np.int32), (4, 1))  # the damage is below: it counts all the same
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
    """Though DALI leaves some of the formats to others."""
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
def test_random_damage_is_a_bad_image_or_passes_but_never_another_error(photograph: Pixels, tmp_path: Path) -> None:
    """The readers raise a zoo of errors on damaged files; all must arrive as BadImage."""
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


def test_dali_that_fails_on_good_images_is_told_apart_from_one_that_does_not_work(
    photos: dict[str, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    dali = pytest.importorskip("nvidia.dali", reason="needs DALI")
    run = dali.Pipeline.run
    fails: Callable[[int], bool] = lambda count: count > 1  # noqa: E731

    def fail(self: object, **inputs: list[object]) -> object:
        if fails(len(inputs["file"])):
            raise RuntimeError("out of memory")
        return run(self, **inputs)

    monkeypatch.setattr(dali.Pipeline, "run", fail)
    decoder, boxes = decoder_for("dali", (32, 32)), random_boxes(427, 640, 2)
    for _ in range(2):
        images = decode(decoder, [photos["jpg"]] * 2, boxes)
    assert torch.equal(images, decode(decoder_for("turbo", (32, 32)), [photos["jpg"]] * 2, boxes))
    (message,) = [message for message in caplog.messages if "out of memory" in message]
    assert "decoded on the CPU" in message
    fails = lambda count: True  # noqa: E731
    with pytest.raises(RuntimeError, match="out of memory"):
        decode(decoder, [photos["jpg"]] * 2, boxes)


def test_names_that_are_not_utf8_are_read_and_can_be_printed(
    tmp_path: Path, write_invalid_name: Callable[[Path, bytes], bytes]
) -> None:
    Image.new("L", (8, 8), 102).save(tmp_path / "x.png")
    written = write_invalid_name(tmp_path / "x.png", b"\xff\xfe \xe9.png")
    dataset = ImageDataset(str(tmp_path), Strings.of([written.rpartition(b"/")[2]]), None, ())
    assert read_header(dataset.read(0, 1000), 100).height == 8
    assert dataset.name(0) == "\\xff\\xfe \\xe9.png"


def test_a_channel_count_that_no_file_has_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.in_channels = 4: expected 3 \(RGB\) or 1 \(grey\)"):
        decoder_for("turbo", (8, 8), 4)


# With a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("hw_decoder_load", [0.0, 0.65, 1.0])
def test_decoding_on_the_gpu_gives_the_pixels_of_the_cpu(
    tmp_path: Path, photograph: Pixels, hw_decoder_load: float
) -> None:
    """Every kind of file, and a full batch of JPEG files, ten times: the hardware decoder is reported to race."""
    formats = write_formats(tmp_path, photograph)
    Image.fromarray(photograph).save(tmp_path / "photo.jpg")
    paths = [path for path, _ in formats.values()] + [tmp_path / "photo.jpg"] * 64
    images = [encoded(path) for path in paths]
    boxes = np.array([(0, 0, image.height, image.width) for image in images], np.int32)
    flips = np.zeros(len(images), bool)
    config = DataConfig(image_size=(64, 96), loader="dali", hw_decoder_load=hw_decoder_load)
    on_gpu = choose_decoder(config, torch.device("cuda", 0), len(images), ThreadPoolExecutor(4))
    expected = decoder_for("turbo", (64, 96), max_batch=len(images)).decode(images, boxes, flips).float()
    for _ in range(10):
        difference = (on_gpu.decode(images, boxes, flips).cpu().float() - expected).abs()
        assert difference.mean((1, 2, 3)).max() < 1.5
