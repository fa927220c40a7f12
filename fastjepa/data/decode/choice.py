"""Choice of the decoder of a run: made once, and logged with its reason."""

from __future__ import annotations

import functools
import logging
from concurrent.futures import ThreadPoolExecutor

import torch

from fastjepa.config import DataConfig
from fastjepa.data.decode.cpu import CPUDecoder
from fastjepa.data.decode.dali import DaliDecoder, dali_problem
from fastjepa.data.decode.images import Decoder
from fastjepa.errors import ConfigError

logger = logging.getLogger(__name__)


def choose_decoder(
    config: DataConfig, device: torch.device, max_batch: int, pool: ThreadPoolExecutor, num_lanes: int = 1
) -> Decoder:
    """Make the decoder that data.loader asks for.

    Args:
        config: the data settings.
        device: where the batches are used.
        max_batch: the largest batch that will be decoded.
        pool: data.num_threads threads.
        num_lanes: decoders that share data.num_threads threads.

    Raises:
        ConfigError: DALI was asked for and cannot be used, or no image file has data.in_channels channels.
    """
    if config.in_channels not in (1, 3):
        raise ConfigError(f"data.in_channels = {config.in_channels}: expected 3 (RGB) or 1 (grey) for image files")
    on_cpu = CPUDecoder(config, pool, pin_memory=device.type == "cuda")
    if not _use_dali(config.loader, device.type):
        return on_cpu
    return DaliDecoder(config, device, max_batch, on_cpu, num_threads=max(1, config.num_threads // num_lanes))


@functools.cache  # so that the choice is logged once
def _use_dali(loader: str, device_type: str) -> bool:
    problem = None if loader == "turbo" else dali_problem()
    if loader == "dali" and problem:
        raise ConfigError(f"data.loader = dali: {problem}; install fastjepa[dali] (Linux), or use data.loader = turbo")
    use_dali = problem is None and (loader == "dali" or (loader == "auto" and device_type == "cuda"))
    why = f"data.loader = {loader}"
    if loader == "auto":
        why += f": {problem}" if problem else f" on a {device_type} device"
    logger.info("images are decoded by %s (%s)", "DALI" if use_dali else "libjpeg-turbo and Pillow", why)
    return use_dali
