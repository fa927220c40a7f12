"""Decoding with NVIDIA DALI: on the CPU, or on the GPU where there is one. The only file that imports nvidia.dali.

DALI reads, decodes, cuts, resizes and normalises; which files and which boxes come from us, batch by batch. Its
pipelines run synchronously: the loader's thread is what keeps them ahead of the step.
"""

from __future__ import annotations

import importlib
import os
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from fastjepa.config import DataConfig
from fastjepa.data.images import BadImage, BadImages


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

    The CPU decodes JPEG files down to the box only: one that is truncated below the box passes unnoticed. All other
    damage that Pillow reports is reported here.
    """

    def __init__(self, config: DataConfig, device: torch.device, max_batch: int) -> None:
        """
        Args:
            config: the data settings; num_threads is the number of DALI's CPU threads.
            device: where to decode, and where the batches lie.
            max_batch: the largest batch that will be asked for.
        """
        self._config = config
        self._device = device
        self._max_batch = max_batch
        self._pipeline: Any = None  # built on use, and again after an error, which leaves it unusable

    def decode(self, paths: Sequence[str], boxes: npt.NDArray[np.int32]) -> Tensor:
        """See `Decoder`."""
        if self._pipeline is None:
            self._pipeline = self._build()  # outside the try: what goes wrong here is no image's fault
        try:
            return self._run(paths, boxes)
        except RuntimeError as error:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)  # raises if the device itself failed: no image is to blame
            # DALI seldom says which of the images it was.
            bad: dict[int, BadImage] = {}
            for position, path in enumerate(paths):
                try:
                    self._run([path], boxes[position : position + 1])
                except RuntimeError as single:
                    bad[position] = BadImage(path, f"DALI cannot decode it ({_reason(single)})")
            if not bad or (len(bad) == len(paths) and not self._works()):
                raise  # the machine is to blame, not the images
            raise BadImages(bad) from error

    def _works(self) -> bool:
        """Whether an image that is known to be good can be decoded."""
        with tempfile.NamedTemporaryFile(suffix=".png") as file:
            Image.new("RGB", (8, 8)).save(file, "png")
            file.flush()
            try:
                self._run([file.name], np.array([[0, 0, 8, 8]], np.int32))
            except RuntimeError:
                return False
        return True

    def _run(self, paths: Sequence[str], boxes: npt.NDArray[np.int32]) -> Tensor:
        pipeline = self._pipeline or self._build()
        self._pipeline = None
        (batch,) = pipeline.run(
            path=[np.frombuffer(os.fsencode(path), np.uint8) for path in paths],
            start=np.ascontiguousarray(boxes[:, :2]),
            shape=np.ascontiguousarray(boxes[:, 2:]),
        )
        self._pipeline = pipeline
        # On the CPU this tensor keeps DALI's buffer alive (dynamic executor) and nothing is copied.
        images = from_dlpack(batch.as_tensor())
        if images.is_cuda:
            # Into torch's allocator, which knows the streams that use it; DALI reuses its own buffer once it is let go,
            # so the copy must be over. Only the calling thread waits.
            images = images.clone()
            torch.cuda.current_stream(images.device).synchronize()
        return images

    def _build(self) -> Any:
        from nvidia.dali import Pipeline, fn, types

        gpu = self._device.type == "cuda"
        gpu_index = torch.cuda.current_device() if gpu and self._device.index is None else self._device.index
        pipeline = Pipeline(
            batch_size=self._max_batch,
            num_threads=self._config.num_threads,
            device_id=gpu_index if gpu else None,
            prefetch_queue_depth=1,
            exec_dynamic=True,
        )
        image = {
            "output_type": types.RGB if self._config.in_channels == 3 else types.GRAY,
            "adjust_orientation": False,
            "jpeg_fancy_upsampling": True,  # on the GPU: chroma as the CPU's decoder has it
        }
        with pipeline:
            path = fn.external_source(name="path", dtype=types.UINT8, ndim=1)
            box = {
                "start": fn.external_source(name="start", dtype=types.INT32, ndim=1),
                "shape": fn.external_source(name="shape", dtype=types.INT32, ndim=1),
                "axis_names": "HW",
            }
            file = fn.io.file.read(path, dont_use_mmap=True)  # a file cut short while mapped would kill the process
            if gpu:
                crop = fn.slice(fn.decoders.image(file, device="mixed", **image), **box)
            else:
                crop = fn.decoders.image_slice(file, **box, **image)
            resized = fn.resize(crop, size=self._config.image_hw, interp_type=types.INTERP_LINEAR, antialias=True)
            pipeline.set_outputs(
                fn.crop_mirror_normalize(
                    resized,
                    dtype=types.FLOAT,
                    mean=[255 * mean for mean in self._config.mean],
                    std=[255 * std for std in self._config.std],
                    output_layout="CHW",
                )
            )
        pipeline.build()
        return pipeline


def _reason(error: RuntimeError) -> str:
    """The one line of DALI's message that is about the image."""
    lines = (str(error).partition("encountered:")[2].strip() or str(error)).splitlines()
    return lines[0].strip() if lines else "cannot be decoded"
