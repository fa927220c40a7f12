"""The decoder on the CPU gives the pixels of Pillow, and of torch's antialiased resampling."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fastjepa.config import DataConfig
from fastjepa.data.order import dct_scale
from tests.support.decoding import decode, decoder_for, random_boxes
from tests.support.image_files import Pixels


def resized_by_pillow(path: Path, boxes: npt.NDArray[np.int32], image_size: tuple[int, int]) -> Tensor:
    """What torchvision's RandomResizedCrop makes of a PIL image, given the boxes: int [B, C, H, W]."""
    with Image.open(path) as image:
        crops = [image.convert("RGB").crop((left, top, left + w, top + h)) for top, left, h, w in boxes.tolist()]
    resized = [np.asarray(crop.resize(image_size[::-1], Image.Resampling.BILINEAR)) for crop in crops]
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).int()


@pytest.mark.parametrize("suffix", ["png", "jpg"])
@pytest.mark.parametrize("image_size", [(224, 224), (64, 96)])
def test_pixels_are_those_of_pillow_within_one_level(
    photos: dict[str, Path], photograph: Pixels, suffix: str, image_size: tuple[int, int]
) -> None:
    boxes = random_boxes(photograph.shape[0], photograph.shape[1], 8)
    images = decode(decoder_for("turbo", image_size, dct_scaling=False), [photos[suffix]] * 8, boxes)
    assert (images.int() - resized_by_pillow(photos[suffix], boxes, image_size)).abs().max() <= 1


def test_crops_are_resized_bilinearly_with_antialiasing(photos: dict[str, Path], photograph: Pixels) -> None:
    """The reference is torch's resampling in float. 8 bits are rounded after each of two axes: hence 1.5 levels."""
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
    """An enlarged photograph with noise, as a JPEG file, is decoded at 1/2, 1/4 or 1/8. The mean difference stays below 0.5
    levels of 255 at 1/2, and below 0.65 at the others."""
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
