"""JPEG files such as cameras make, from the two photographs that scikit-learn ships."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

Size = tuple[int, int]
"""Width and height in pixels."""

QUALITY = 90
_NOISE = 4.0
"""Standard deviation in levels of 255. Enlarged photographs are smooth: without noise, files have a third of a real size."""


def make_photographs(folder: Path, size: Size, count: int) -> list[Path]:
    """Write `count` baseline JPEG files (4:2:0): random crops of the photographs, resized to `size`, with noise.

    Returns:
        Their paths, sorted by name.
    """
    rng = np.random.default_rng(0)
    originals = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    folder.mkdir(parents=True)
    files = []
    for number in range(count):
        original = originals[number % len(originals)]
        scale = rng.uniform(0.5, 1) * min(original.width / size[0], original.height / size[1])
        width, height = scale * size[0], scale * size[1]
        left, top = rng.uniform(0, original.width - width), rng.uniform(0, original.height - height)
        resized = original.resize(size, Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))
        noise = _NOISE * rng.standard_normal((size[1], size[0], 3), np.float32)
        pixels = (np.asarray(resized) + noise).clip(0, 255).astype(np.uint8)
        files.append(folder / f"{number:05}.jpg")
        Image.fromarray(pixels).save(files[-1], quality=QUALITY, subsampling="4:2:0")
    return files
