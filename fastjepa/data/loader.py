"""Micro batches, prepared ahead of the step by background threads.

Step s takes positions s * G to s * G + G - 1 of the run's endless sequence of samples (G: the global batch size). An
epoch of n images has n // G steps and an order of its own. Up to G - 1 images at its end are left out, different ones in
each epoch.
"""

from __future__ import annotations

import functools
import queue
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.profiler import record_function

from fastjepa.config import Config, DataConfig
from fastjepa.data.bad_samples import BadSamples
from fastjepa.data.dataset import ImageDataset, Ints
from fastjepa.data.decode.choice import choose_decoder
from fastjepa.data.order import Boxes, batch_positions, epoch_order
from fastjepa.data.reader import Reader, ViewDecoder
from fastjepa.objectives.base import Method, Moment, Prepared

_MAX_LANES = 2


class Seconds(NamedTuple):
    """Wall-clock seconds that preparing a micro batch took, on a thread that runs beside the step."""

    read: float
    """Reading files and headers."""
    decode: float
    """Decoding and resizing."""
    to_device: float
    """Copying images decoded on the host to the device."""
    prepare: float
    """`Method.prepare`: for I-JEPA, sampling and packing masks."""


@dataclass(frozen=True)
class Batch:
    """One micro batch of one rank, on its device."""

    prepared: Prepared
    """The input of the objective's forward pass."""
    sample_ids: Ints
    """int64 [B]: indices in the data set, those of the replacements where images were bad."""
    boxes: tuple[Boxes, ...]
    """Per view, int32 [B, 4]: top, left, height, width of the crops, in pixels of the images."""
    flips: tuple[npt.NDArray[np.bool_], ...]
    """Per view, [B]: True where the crop is mirrored."""
    seconds: Seconds


class Loader:
    """Iterates over a rank's micro batches, in order, from step `start_step` to `total_steps` - 1.

    The samples of a step, their crops and their masks depend on the seed and the step alone: not on the number of ranks,
    the split into micro batches, or a resume.

    A bad image does not end a run: another image takes its place (`order.replacement`). Only too many bad images do
    (`BadSamples`).

    Up to two threads prepare one batch each. Each takes a lane, which has decoders and a CUDA stream of its own, so that
    one thread can read files or wait for the GPU while the other decodes. Within a batch, the files are read and decoded by
    a pool of data.num_threads threads, which the lanes share.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        config: Config,
        method: Method,
        *,
        rank: int,
        world_size: int,
        micro_batch_size: int,
        grad_accum_steps: int,
        steps_per_epoch: int,
        start_step: int,
        total_steps: int,
        device: torch.device,
        bad_samples_file: Path | None = None,
    ) -> None:
        """Start preparing batches.

        Raises:
            ValueError: the data set has fewer images than the steps of an epoch need.
        """
        self._global_batch_size = world_size * micro_batch_size * grad_accum_steps
        if steps_per_epoch * self._global_batch_size > len(dataset):
            raise ValueError(
                f"steps_per_epoch = {steps_per_epoch} with a global batch of {self._global_batch_size} images: "
                f"the data set has {len(dataset)}; use a smaller batch or more images"
            )
        device = torch.empty(0, device=device).device  # "cuda" gets its index
        self._config, self._method, self._device = config, method, device
        self._steps_per_epoch, self._total_steps = steps_per_epoch, total_steps
        self._positions = functools.partial(
            batch_positions, rank=rank, world_size=world_size, micro_batch_size=micro_batch_size, accum=grad_accum_steps
        )
        # Two epochs: one lane may still be in the old epoch when the other begins a new one.
        self._orders = functools.lru_cache(2)(functools.partial(epoch_order, config.seed, num_images=len(dataset)))
        self._orders_lock = threading.Lock()  # so that the lanes do not compute the same order twice
        self.bad_samples = BadSamples(dataset, config.data.max_bad_share, bad_samples_file)
        """The bad images of the run so far. `len` counts distinct ones, over all ranks."""
        self._pool = ThreadPoolExecutor(config.data.num_threads, thread_name_prefix="fastjepa-images")
        num_lanes = min(_MAX_LANES, config.data.prefetch)
        self._lanes: queue.SimpleQueue[_Lane] = queue.SimpleQueue()
        for _ in range(num_lanes):
            settings = [view.settings(config.data) for view in method.views]
            views = [
                ViewDecoder(each, choose_decoder(each, device, micro_batch_size, self._pool, num_lanes))
                for each in settings
            ]
            reader = Reader(dataset, views, config.seed, self._pool, self.bad_samples)
            self._lanes.put(_Lane(reader, torch.cuda.Stream(device) if device.type == "cuda" else None))
        self._todo = ((step, micro) for step in range(start_step, total_steps) for micro in range(grad_accum_steps))
        # A new thread starts on the first GPU, even if the process uses another.
        start = functools.partial(torch.cuda.set_device, device) if device.type == "cuda" else None
        self._threads = ThreadPoolExecutor(num_lanes, thread_name_prefix="fastjepa-loader", initializer=start)
        self._pending: deque[Future[Batch]] = deque()
        self._delivered: Batch | None = None
        self._in_use: deque[tuple[Batch, torch.cuda.Event]] = deque()
        self._submit(config.data.prefetch)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """The next micro batch, complete on its device.

        On a GPU, the caller must have queued all work on the micro batch before it by now, on the current stream: the
        memory of that batch is reused when this work is done. An error in a thread is raised here, with its traceback, and
        closes the loader.
        """
        self._keep_batches_in_use()
        if not self._pending:
            raise StopIteration
        future = self._pending.popleft()
        if future.exception():
            self.close()
        batch = future.result()
        self._submit(1)
        self._delivered = batch if self._device.type == "cuda" else None
        return batch

    def _keep_batches_in_use(self) -> None:
        """On a GPU, keep each delivered batch until the work queued on it is done.

        Its memory belongs to other streams, and to DALI, which would write the next images into it.
        """
        if self._delivered is not None:
            done = torch.cuda.current_stream(self._device).record_event()
            self._in_use.append((self._delivered, done))
            self._delivered = None
        while self._in_use and self._in_use[0][1].query():
            self._in_use.popleft()

    def close(self) -> None:
        """Stop the threads. They finish the batches that they have begun; batches prepared ahead are dropped."""
        self._stop()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # after this no batch is in use
        self._in_use.clear()
        self._delivered = None

    def _stop(self) -> None:
        self._pending.clear()
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._pool.shutdown(wait=True)

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._stop()  # do not wait for the GPU: it may be waiting for a rank that is gone

    def _submit(self, count: int) -> None:
        for step, micro_step in islice(self._todo, count):
            self._pending.append(self._threads.submit(self._prepare, step, micro_step))

    def _prepare(self, step: int, micro_step: int) -> Batch:
        """Prepare one micro batch, on a thread of its own."""
        lane = self._lanes.get()  # never waits: there are as many lanes as threads
        try:
            with torch.cuda.stream(lane.stream), record_function("loader"):  # torch.cuda.stream(None) does nothing
                return self._load(lane, step, micro_step)
        finally:
            self._lanes.put(lane)

    def _load(self, lane: _Lane, step: int, micro_step: int) -> Batch:
        config = self._config
        positions = self._positions(step, micro_step)
        epoch, epoch_step = divmod(step, self._steps_per_epoch)
        with self._orders_lock:
            order = self._orders(epoch)
        wanted = order[positions - (step - epoch_step) * self._global_batch_size]
        images = lane.reader.read(wanted, epoch)
        decoded = time.perf_counter()
        pixels = [view.to(self._device, non_blocking=True) for view in images.pixels]
        if config.data.pixels == "normalised":
            pixels = [normalise(view, config.data) for view in pixels]
        lane.wait()
        copied = time.perf_counter()
        with record_function("preparing"):
            sample_indices = torch.from_numpy(positions).to(self._device)
            moment = Moment(step, self._steps_per_epoch, self._total_steps)
            prepared = self._method.prepare(pixels, sample_indices, moment)
            lane.wait()
        seconds = Seconds(
            read=images.read_seconds,
            decode=images.decode_seconds,
            to_device=copied - decoded,
            prepare=time.perf_counter() - copied,
        )
        return Batch(prepared, images.sample_ids, images.boxes, images.flips, seconds)


class _Lane(NamedTuple):
    """The reader and the CUDA stream with which one thread prepares a batch."""

    reader: Reader
    stream: torch.cuda.Stream | None

    def wait(self) -> None:
        """Wait until the GPU has done this lane's work. The training step and other lanes do not wait."""
        if self.stream is not None:
            self.stream.synchronize()


def normalise(images: Tensor, config: DataConfig) -> Tensor:
    """Compute (x / 255 - mean) / std by channel: uint8 [B, C, H, W] -> float32."""
    mean, std = (torch.tensor(x, device=images.device)[:, None, None] for x in (config.mean, config.std))
    return images.float().div_(255).sub_(mean).div_(std)
