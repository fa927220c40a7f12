"""Images for the tests of `fastjepa check`: encoded in many formats, damaged, and written into folders."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def pattern(seed: int, size: tuple[int, int] = (60, 40)) -> Image.Image:
    """A smooth RGB image of width x height, another one for each seed."""
    noise = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def with_alpha(image: Image.Image) -> Image.Image:
    image = image.copy()
    image.putalpha(77)
    return image


def garbled(jpeg: bytes) -> bytes:
    """A complete JPEG file with wrong data in its middle."""
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


def random_damage(folder: Path, count: int) -> Path:
    """Write files of many formats, with some bytes changed or the end cut off."""
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
