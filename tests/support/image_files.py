"""Image files of many kinds, as bytes or in a folder."""

import struct
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

Pixels = npt.NDArray[np.uint8]


def png(width: int, height: int, bit_depth: int, colour_type: int, rows: bytes) -> bytes:
    """Make a PNG file from its filtered rows: Pillow writes neither 16-bit RGB nor headers without pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, bit_depth, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def png16(pixels: npt.NDArray[np.uint16]) -> bytes:
    """Make a 16-bit PNG file from uint16 [H, W, 1 | 3]."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    return png(pixels.shape[1], pixels.shape[0], 16, 0 if pixels.shape[2] == 1 else 2, rows)


def write_formats(folder: Path, photograph: Pixels) -> dict[str, tuple[Path, Pixels]]:
    """Write a file of each kind. Returns name -> (file, the RGB pixels that it stands for)."""
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
