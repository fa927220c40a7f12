"""The contestants: fastjepa's Loader with each of its decoders, and the torch DataLoader that one would write without it.

In a turn a contestant prepares one epoch of its files; between turns it is idle, so that all can be timed in turns in one
process. The DataLoader's workers stay alive between turns. The Loader keeps what it has prefetched, so it prepares as many
batches in a turn as are taken from it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from concurrent.futures import wait
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastjepa.config import Config, DataConfig
from fastjepa.data import Batch, Loader, open_dataset, steps_per_epoch
from fastjepa.data.decode.dali import dali_problem
from fastjepa.objectives.ijepa.objective import MaskedImages
from fastjepa.objectives.ijepa.settings import IJEPAConfig
from fastjepa.objectives.registry import method_of

Box = tuple[int, int, int, int]
"""Top, left, height, width in pixels."""

CPU = torch.device("cpu")
# The first reads a file as torchvision's ImageFolder does. The second omits convert("RGB") where an image already is RGB,
# because Pillow copies the image even then.
RIVALS = ("DataLoader + Pillow", "DataLoader + Pillow, no convert")
RIVAL = RIVALS[0]
DALI_ON_GPU = "fastjepa DALI, GPU"

# Name -> data settings, then the largest and the mean difference from Pillow's pixels that are allowed over a batch, in
# levels of 255. They are those of tests/data/decode, except that a few of turbo's millions of pixels are 2 levels off.
OURS: dict[str, tuple[dict[str, object], float, float]] = {
    "fastjepa turbo": ({"loader": "turbo"}, 20, 0.5),
    "fastjepa turbo, to fp32": ({"loader": "turbo", "pixels": "normalised"}, 20, 0.5),
    "fastjepa turbo, dct_scaling off": ({"loader": "turbo", "dct_scaling": False}, 2, 0.1),
    "fastjepa DALI, CPU": ({"loader": "dali"}, 20, 0.3),
    DALI_ON_GPU: ({"loader": "dali"}, 50, 1.0),
}


def problem_with(name: str) -> str | None:
    """The reason why a contestant in OURS cannot take part on this machine, or None."""
    if name == DALI_ON_GPU and not torch.cuda.is_available():
        return "needs a CUDA device"
    return dali_problem() if "DALI" in name else None


def open_loader(config: Config, device: torch.device) -> Loader:
    """A Loader for a run on one rank that never ends."""
    dataset = open_dataset(config.data, "train")
    assert dataset is not None
    return Loader(
        dataset,
        config,
        method_of(config),
        rank=0,
        world_size=1,
        micro_batch_size=config.global_batch_size,
        grad_accum_steps=1,
        steps_per_epoch=steps_per_epoch(len(dataset), config.global_batch_size),
        start_step=0,
        total_steps=1 << 30,
        device=device,
    )


class Ours:
    """fastjepa.data.Loader from file to batch on `device`, masks included."""

    def __init__(self, name: str, files: Sequence[Path], batch_size: int, threads: int, device: torch.device) -> None:
        settings, *bounds = OURS[name]
        self._bounds = tuple(bounds)
        self._files, self._batches = files, len(files) // batch_size
        self._data = DataConfig(source=str(files[0].parent), num_threads=threads, **settings)  # type: ignore[arg-type]
        config = Config(data=self._data, objective=IJEPAConfig(), global_batch_size=batch_size)
        self._loader = open_loader(config, CPU if name.endswith("CPU") else device)
        self.prepare_shares: list[float] = []
        """The share of each batch's preparation (on its thread) that sampled masks."""

    def turn(self) -> None:
        for _ in range(self._batches):
            seconds = next(self._loader).seconds
            self.prepare_shares.append(seconds.prepare / sum(seconds))
        wait(self._loader._pending)  # until the Loader is idle

    def problem(self, batch: Batch | None = None) -> str | None:
        """The difference of a batch (None: the next one) from Pillow's pixels of the same files and boxes, or None."""
        batch = batch or next(self._loader)
        pairs = zip(batch.sample_ids, batch.boxes[0].tolist(), strict=True)
        expected = torch.stack([crop_by_pillow(self._files[index], box) for index, box in pairs])
        assert isinstance(batch.prepared, MaskedImages)
        images = batch.prepared.images.cpu().float()
        if self._data.pixels == "normalised":
            images = 255 * (images * _column(self._data.std) + _column(self._data.mean))
        difference = (images - expected).abs()
        found, bounds = (difference.max().item(), difference.mean().item()), self._bounds
        if all(
            value < bound + 0.01 for value, bound in zip(found, bounds, strict=True)
        ):  # 0.01: rounding of fp32 batches
            return None
        return f"differs from Pillow by {found[0]:.0f} levels at most, {found[1]:.2f} on average; bounds: {bounds}"

    def close(self) -> None:
        self._loader.close()


class Rival:
    """A torch DataLoader with Pillow. It samples no masks."""

    def __init__(self, name: str, files: Sequence[Path], batch_size: int, workers: int, device: torch.device) -> None:
        self._device = device
        self._loader = DataLoader(
            _Crops(files, always_convert=name == RIVAL),
            batch_size,
            shuffle=True,
            num_workers=workers,
            pin_memory=device.type == "cuda",
            drop_last=True,
            persistent_workers=True,
        )

    def turn(self) -> None:
        for batch in self._loader:
            batch.to(self._device, non_blocking=True)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def close(self) -> None:
        del self._loader  # ends the workers


class _Crops(Dataset[Tensor]):
    """Random normalised crops, float32 [3, 224, 224] each."""

    def __init__(self, files: Sequence[Path], *, always_convert: bool) -> None:
        config = DataConfig()
        self._files, self._always_convert = files, always_convert
        self._mean, self._std = _column(config.mean), _column(config.std)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Tensor:
        pixels = crop_by_pillow(self._files[index], always_convert=self._always_convert)
        return pixels.float().div_(255).sub_(self._mean).div_(self._std)


def crop_by_pillow(file: Path, box: Box | None = None, *, always_convert: bool = True) -> Tensor:
    """The crop of a file at `box` (None: at a random one), uint8 [3, 224, 224]."""
    config = DataConfig()
    image: Image.Image = Image.open(file)
    if always_convert or image.mode != "RGB":
        image = image.convert("RGB")
    top, left, height, width = box or random_box(image.width, image.height)
    crop = image.crop((left, top, left + width, top + height)).resize(config.image_hw[::-1], Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(crop)).permute(2, 0, 1).contiguous()


def random_box(
    width: int, height: int, scale: tuple[float, float] = (0.3, 1.0), aspect: tuple[float, float] = (3 / 4, 4 / 3)
) -> Box:
    """Draw a box as torchvision documents RandomResizedCrop.

    It has a random share of the area and a random width / height (log-uniform). The first of ten draws that fits is taken;
    if none fits, the largest central box within the limits.
    """
    for _ in range(10):
        area = random.uniform(*scale) * width * height
        ratio = math.exp(random.uniform(math.log(aspect[0]), math.log(aspect[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return random.randint(0, height - h), random.randint(0, width - w), h, w
    w, h = min(width, round(height * aspect[1])), min(height, round(width / aspect[0]))
    return (height - h) // 2, (width - w) // 2, h, w


def _column(values: Sequence[float]) -> Tensor:
    return torch.tensor(values)[:, None, None]
