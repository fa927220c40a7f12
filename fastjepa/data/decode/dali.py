"""Decoding with NVIDIA DALI: on the GPU where there is one, else on the CPU. No other file imports nvidia.dali.

DALI decodes, cuts, resizes and mirrors. fastjepa chooses the images and the boxes, and hands over the files' bytes, batch by
batch. The pipelines run synchronously: the loader's threads keep them ahead of the step.

DALI gets bytes and not paths, for three reasons. The header is read from the same bytes, so each file is opened once and
cannot change in between. Tar shards and tables go the same way as files. And a file that cannot be read never reaches DALI,
whose pipelines do not survive one.
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
from fastjepa.data.decode.images import Decoder, EncodedImage, read_header
from fastjepa.data.image_errors import BadImages

logger = logging.getLogger(__name__)


def dali_problem() -> str | None:
    """Why DALI cannot be used on this machine, or None."""
    try:
        version = getattr(importlib.import_module("nvidia.dali"), "__version__", "0.0.0")
    except ImportError as error:
        return f"nvidia.dali cannot be imported ({error})"
    # On systems without a build, PyPI installs an empty package, version 0.0.0.
    return "the installed nvidia-dali is an empty placeholder, version 0.0.0" if version == "0.0.0" else None


class DaliDecoder:
    """`Decoder` on a CPU or a CUDA device.

    DALI cannot decode GIF, AVIF and animated WebP. Another decoder decodes these, and whatever else fails in DALI. It also
    says which images are bad, so that the same images are bad with any decoder. Therefore it gets three more formats: TIFF,
    which DALI reads only down to the box; JPEG in CMYK, of which DALI accepts some damaged files; and PNM, which DALI
    confuses between 8 and 16 bits.
    """

    def __init__(
        self, config: DataConfig, device: torch.device, max_batch: int, other_decoder: Decoder, *, num_threads: int
    ) -> None:
        """
        Args:
            config: the data settings.
            device: where to decode, and where the batches lie.
            max_batch: the largest batch that will be asked for.
            other_decoder: decodes what DALI does not.
            num_threads: DALI's own threads on the CPU.
        """
        self._config, self._device, self._max_batch = config, device, max_batch
        self._other_decoder = other_decoder
        self._num_threads = num_threads
        self._pipeline: Any = None  # built when it is first used, and again after an error, which leaves it unusable
        self._logged_reasons: set[str] = set()

    def decode(
        self, images: Sequence[EncodedImage], boxes: npt.NDArray[np.int32], flips: npt.NDArray[np.bool_]
    ) -> Tensor:
        """See `Decoder`.

        Raises:
            RuntimeError: DALI does not work on this machine: it fails on an image that is known to be good.
        """
        for_dali = np.array([_dali_reads(image) for image in images])
        if for_dali.all():
            return self._decode_with_dali(images, boxes, flips)
        batch = torch.empty(
            (len(images), self._config.in_channels, *self._config.image_hw), dtype=torch.uint8, device=self._device
        )
        bad: dict[int, str] = {}
        parts = []
        for decode, chosen in ((self._decode_with_dali, for_dali), (self._other_decoder.decode, ~for_dali)):
            positions = np.flatnonzero(chosen)
            if not positions.size:
                continue
            try:
                part = decode([images[int(i)] for i in positions], boxes[positions], flips[positions])
                parts.append(part.to(self._device))
                batch[torch.from_numpy(positions).to(self._device)] = parts[-1]
            except BadImages as error:
                bad |= {int(positions[i]): reason for i, reason in error.bad.items()}
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()  # DALI gets the memory of `parts` back
        if bad:
            raise BadImages(dict(sorted(bad.items())))
        return batch

    def _decode_with_dali(
        self, images: Sequence[EncodedImage], boxes: npt.NDArray[np.int32], flips: npt.NDArray[np.bool_]
    ) -> Tensor:
        try:
            return self._run(images, boxes, flips)
        except RuntimeError as error:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)  # raises if the device itself failed: no image is to blame
            self._decode_a_good_image()
            pixels = self._other_decoder.decode(images, boxes, flips)  # raises BadImages if images are to blame
            if (reason := _reason(error)) not in self._logged_reasons:
                self._logged_reasons.add(reason)
                logger.warning(
                    "DALI fails on a batch whose images are good (%s): such batches are decoded on the CPU", reason
                )
            return pixels.to(self._device)

    def _decode_a_good_image(self) -> None:
        """Let DALI's error out if it fails on a good image, too: then the machine is to blame."""
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
        # for DALI's. The caller must hold the tensor until the work on it is done, as Loader and evaluation do.
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
            # DALI ignores these two on the CPU.
            "jpeg_fancy_upsampling": True,  # so that the chroma equals that of the CPU's decoder
            "hw_decoder_load": self._config.hw_decoder_load,
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
