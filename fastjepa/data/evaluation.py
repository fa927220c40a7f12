"""Images for evaluation, in central crops. Bad images are left out, not replaced."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from fastjepa.config import DataConfig
from fastjepa.data.dataset import ImageDataset, Ints
from fastjepa.data.decode.choice import choose_decoder
from fastjepa.data.image_errors import BadImages
from fastjepa.data.order import central_boxes
from fastjepa.data.reader import fetch, sizes_of

logger = logging.getLogger(__name__)

_AT_ONCE = 256


def evaluation_batches(
    dataset: ImageDataset, indices: Ints, config: DataConfig, device: torch.device
) -> Iterator[tuple[Ints, Tensor]]:
    """Read the images at `indices`, int64 [n], in batches, each image at its largest central box.

    Bad images are left out, with a warning that names them.

    Yields:
        The indices of a batch, int64 [B], and its pixels, uint8 [B, C, H, W] on `device`. The next batch may overwrite the
        pixels.
    """
    with ThreadPoolExecutor(config.num_threads, thread_name_prefix="fastjepa-images") as pool:
        decoder = choose_decoder(config, device, min(len(indices), _AT_ONCE), pool)
        for start in range(0, len(indices), _AT_ONCE):
            batch = indices[start : start + _AT_ONCE]
            images, bad = fetch(dataset, batch, config, pool)
            pixels: Tensor | None = None
            while pixels is None:
                for position, reason in bad.items():
                    logger.warning("left out of the evaluation: %s: %s", dataset.name(int(batch[position])), reason)
                good = [position for position in range(len(batch)) if position not in bad]
                batch, images = batch[good], [images[position] for position in good]
                if not good:
                    break
                files = [image for image in images if image is not None]
                try:
                    pixels = decoder.decode(files, central_boxes(config, sizes_of(files)), np.zeros(len(files), bool))
                except BadImages as error:
                    bad = dict(error.bad)
            if pixels is not None:
                yield batch, pixels.to(device)
                if device.type == "cuda":  # DALI may write the next images into the same memory
                    torch.cuda.current_stream(device).synchronize()
