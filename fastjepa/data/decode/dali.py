"""Decoding with NVIDIA DALI: on the CPU, or on the GPU where there is one. The only file that imports nvidia.dali.

DALI decodes, cuts, resizes and mirrors; which images, which boxes and the files' bytes come from us, batch by batch. Its
pipelines run synchronously: the loader's threads are what keeps them ahead of the step.

The bytes are handed to DALI instead of paths: their header is read from the same bytes, so that each file is opened once
and cannot change in between, tar shards and tables go the same way as files, and a file that cannot be read never
reaches DALI, whose pipelines do not survive one.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import simplejpeg
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from fastjepa.config import DataConfig
from fastjepa.data.decode.images import BadImages, Decoder, EncodedImage, read_header

logger = logging.getLogger(__name__)


def dali_problem() -> str | None:
    """Why DALI cannot be used on this machine, or None."""
    try:
        version = getattr(importlib.import_module("nvidia.dali"), "__version__", "0.0.0")
    except ImportError as error:
        return f"nvidia.dali cannot be imported ({error})"
    # On systems without a build, PyPI installs an empty package of that version.
    return "the installed nvidia-dali is an empty placeholder, version 0.0.0" if version == "0.0.0" else None


class DaliDecoder:
    """`Decoder` on a CPU or a CUDA device.

    What DALI cannot decode (GIF, AVIF, animated WebP, and whatever else fails in it) is decoded by another decoder, which
    also says which images are bad: so the same images are bad with any decoder. (Therefore TIFF, too, which DALI reads down
    to the box only, JPEG files in CMYK, of which it takes some that are damaged, and PNM, which it takes for 8 or 16 bits.)
    """

    def __init__(
        self, config: DataConfig, device: torch.device, max_batch: int, other: Decoder, *, num_threads: int
    ) -> None:
        """
        Args:
            config: the data settings.
            device: where to decode, and where the batches lie.
            max_batch: the largest batch that will be asked for.
            other: decodes the rest.
            num_threads: of DALI's own, on the CPU.
        """
        self._config, self._device, self._max_batch, self._other = config, device, max_batch, other
        self._num_threads = num_threads
        self._pipeline: Any = None  # built on use, and again after an error, which leaves it unusable
        self._told: set[str] = set()

    def decode(
        self, images: Sequence[EncodedImage], boxes: npt.NDArray[np.int32], flips: npt.NDArray[np.bool_]
    ) -> Tensor:
        """See `Decoder`.

        Raises:
            RuntimeError: DALI fails on images that are known to be good.
        """
        mine = np.array([_dali_reads(image) for image in images])
        if mine.all():
            return self._decode(images, boxes, flips)
        batch = torch.empty(
            (len(images), self._config.in_channels, *self._config.image_hw), dtype=torch.uint8, device=self._device
        )
        bad: dict[int, str] = {}
        parts = []
        for decode, those in ((self._decode, mine), (self._other.decode, ~mine)):
            some = np.flatnonzero(those)
            if not some.size:
                continue
            try:
                parts.append(decode([images[int(i)] for i in some], boxes[some], flips[some]).to(self._device))
                batch[torch.from_numpy(some).to(self._device)] = parts[-1]
            except BadImages as error:
                bad |= {int(some[position]): reason for position, reason in error.bad.items()}
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()  # before DALI gets the memory of `parts` back
        if bad:
            raise BadImages(dict(sorted(bad.items())))
        return batch

    def _decode(
        self, images: Sequence[EncodedImage], boxes: npt.NDArray[np.int32], flips: npt.NDArray[np.bool_]
    ) -> Tensor:
        try:
            return self._run(images, boxes, flips)
        except RuntimeError as error:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)  # raises if the device itself failed: no image is to blame
            self._check_that_it_works()
            pixels = self._other.decode(images, boxes, flips)  # raises BadImages if it is the images' fault
            if (reason := _reason(error)) not in self._told:
                self._told.add(reason)
                logger.warning(
                    "DALI fails on a batch whose images are good (%s): such batches are decoded on the CPU", reason
                )
            return pixels.to(self._device)

    def _check_that_it_works(self) -> None:
        """Raises what DALI raises on a good image: then the machine is to blame."""
        good = read_header(simplejpeg.encode_jpeg(np.zeros((16, 16, 3), np.uint8)), 1000)
        self._run([good], np.array([[0, 0, 16, 16]], np.int32), np.array([False]))

    def _run(
        self, images: Sequence[EncodedImage], boxes: npt.NDArray[np.int32], flips: npt.NDArray[np.bool_]
    ) -> Tensor:
        pipeline = self._pipeline or self._build()
        self._pipeline = None
        inputs: dict[str, Any] = {
            "file": [np.frombuffer(image.data, np.uint8) for image in images],
            "start": np.ascontiguousarray(boxes[:, :2]),
            "shape": np.ascontiguousarray(boxes[:, 2:]),
        }
        if self._config.flip:
            inputs["flip"] = flips.astype(np.int32)
        (batch,) = pipeline.run(**inputs)
        self._pipeline = pipeline
        # Nothing is copied: the tensor keeps DALI's buffer alive (dynamic executor). On a GPU, torch's current stream waits
        # for DALI's; whoever takes the tensor must hold it until the work on it is done, as Loader and evaluation do.
        return from_dlpack(batch.as_tensor())

    def _build(self) -> Any:
        from nvidia.dali import Pipeline, fn, types

        gpu = self._device.type == "cuda"
        gpu_index = torch.cuda.current_device() if gpu and self._device.index is None else self._device.index
        pipeline = Pipeline(
            batch_size=self._max_batch,
            num_threads=self._num_threads,
            device_id=gpu_index if gpu else None,
            prefetch_queue_depth=1,
            exec_dynamic=True,
        )
        image = {
            "output_type": types.RGB if self._config.in_channels == 3 else types.GRAY,
            "adjust_orientation": False,
            "jpeg_fancy_upsampling": True,  # on the GPU: chroma as the CPU's decoder has it
            "hw_decoder_load": self._config.hw_decoder_load,  # these two: ignored on the CPU
        }
        with pipeline:
            file = fn.external_source(name="file", dtype=types.UINT8, ndim=1)
            box = {
                "start": fn.external_source(name="start", dtype=types.INT32, ndim=1),
                "shape": fn.external_source(name="shape", dtype=types.INT32, ndim=1),
                "axis_names": "HW",
            }
            if gpu:
                crop = fn.slice(fn.decoders.image(file, device="mixed", **image), **box)
            else:
                crop = fn.decoders.image_slice(file, **box, **image)
            resized = fn.resize(crop, size=self._config.image_hw, interp_type=types.INTERP_LINEAR, antialias=True)
            mirror = {"mirror": fn.external_source(name="flip", dtype=types.INT32, ndim=0)} if self._config.flip else {}
            channels = self._config.in_channels
            pipeline.set_outputs(
                fn.crop_mirror_normalize(
                    resized,
                    dtype=types.UINT8,
                    mean=[0.0] * channels,
                    std=[1.0] * channels,
                    output_layout="CHW",
                    **mirror,
                )
            )
        pipeline.build()
        return pipeline


def _dali_reads(image: EncodedImage) -> bool:
    if image.format == "JPEG":
        return image.plain_jpeg
    return image.format not in ("AVIF", "GIF", "PPM", "TIFF") and not (image.format == "WEBP" and image.animated)


def _reason(error: RuntimeError) -> str:
    """The one line of DALI's message that is about the image."""
    lines = (str(error).partition("encountered:")[2].strip() or str(error)).splitlines()
    return lines[0].strip() if lines else "no reason given"
