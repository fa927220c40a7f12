"""Makes decoders in the way a run does, and decodes files with them."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastjepa.config import DataConfig
from fastjepa.data.decode.choice import choose_decoder
from fastjepa.data.decode.images import Decoder, EncodedImage, read_header
from fastjepa.data.order import crop_boxes

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


def random_boxes(
    height: int, width: int, count: int, image_size: tuple[int, int] = (224, 224)
) -> npt.NDArray[np.int32]:
    sizes = np.tile(np.array([(height, width)], np.int32), (count, 1))
    config = DataConfig(image_size=image_size)
    return crop_boxes(config, seed=0, epoch=0, indices=np.arange(count), sizes=sizes)
