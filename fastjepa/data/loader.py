"""Batches of images and masks, prepared ahead of the step by one background thread.

Step s takes positions s * G to s * G + G - 1 of the run's endless sequence of samples (G: the global batch size). An
epoch is n // G steps in an order of its own; the up to G - 1 images at its end are left out, others in each epoch.
"""

from __future__ import annotations

import functools
import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from types import TracebackType

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastjepa.config import Config, DataConfig
from fastjepa.data.dali import DaliDecoder, dali_problem
from fastjepa.data.images import BadImage, BadImages, Decoder, read_sizes
from fastjepa.data.order import Boxes, Ints, batch_positions, central_boxes, crop_boxes, epoch_order
from fastjepa.data.pillow import PillowDecoder
from fastjepa.data.sources import ImageDataset
from fastjepa.errors import ConfigError, DataError
from fastjepa.masks import MaskBatch, sample_masks
from fastjepa_kernels.ragged import Ragged

_log = logging.getLogger(__name__)

_EVALUATION_BATCH = 256


@dataclass(frozen=True)
class Batch:
    """One micro batch of one rank, on its device."""

    images: Tensor
    """float32 [B, C, H, W], normalised."""
    masks: MaskBatch
    sample_ids: Ints
    """int64 [B]: indices in the data set, those of the replacements where images were bad."""


class Loader:
    """Iterates over a rank's micro batches, in order, from step `start_step` to `total_steps` - 1.

    The samples, their crops and masks depend on the seed and the step alone, not on rank or world size, split or resume.

    A bad image never ends a run: it is replaced by the next in the data set that is good, with that one's own crop. It is
    not tried again, is named once in the log and counted in `bad_samples`.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        config: Config,
        *,
        rank: int,
        world_size: int,
        micro_batch_size: int,
        grad_accum_steps: int,
        steps_per_epoch: int,
        start_step: int,
        total_steps: int,
        device: torch.device,
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
        self._config = config
        self._steps_per_epoch = steps_per_epoch
        self._positions = functools.partial(
            batch_positions, rank=rank, world_size=world_size, micro_batch_size=micro_batch_size, accum=grad_accum_steps
        )
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._reader = _Reader(dataset, config.data, device, micro_batch_size)
        self._order = functools.lru_cache(1)(functools.partial(epoch_order, config.seed, num_images=len(dataset)))
        self._todo = ((step, micro) for step in range(start_step, total_steps) for micro in range(grad_accum_steps))
        # A thread begins on the first GPU, whichever the process uses.
        start = functools.partial(torch.cuda.set_device, device) if device.type == "cuda" else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fastjepa-loader", initializer=start)
        self._pending: deque[Future[tuple[Batch, torch.cuda.Event | None]]] = deque()
        self._submit(config.data.prefetch)

    @property
    def bad_samples(self) -> int:
        """Bad images met so far by this rank."""
        return self._reader.bad_samples

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """The next micro batch. An error in the thread is raised here, with its traceback, and closes the loader."""
        if not self._pending:
            raise StopIteration
        prepared = self._pending.popleft()
        if prepared.exception():
            self.close()
        batch, ready = prepared.result()
        self._submit(1)
        if ready is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(ready)
            for tensor in _tensors(batch):  # they were allocated on the other stream
                tensor.record_stream(stream)
        return batch

    def close(self) -> None:
        """Stop the thread: it ends after the batch in hand. Batches prepared ahead are dropped."""
        self._pending.clear()
        self._thread.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _submit(self, count: int) -> None:
        for step, micro_step in islice(self._todo, count):
            self._pending.append(self._thread.submit(self._prepare, step, micro_step))

    def _prepare(self, step: int, micro_step: int) -> tuple[Batch, torch.cuda.Event | None]:
        """On the thread: one micro batch, and the event after which its tensors are ready."""
        if self._stream is None:
            return self._load(step, micro_step), None
        with torch.cuda.stream(self._stream):
            batch = self._load(step, micro_step)
            return batch, self._stream.record_event()

    def _load(self, step: int, micro_step: int) -> Batch:
        config = self._config
        positions = self._positions(step, micro_step)
        epoch, epoch_step = divmod(step, self._steps_per_epoch)
        wanted = self._order(epoch)[positions - (step - epoch_step) * self._global_batch_size]
        masks = sample_masks(
            config.masks,
            config.grid_h,
            config.grid_w,
            seed=config.seed,
            step=step,
            sample_indices=torch.from_numpy(positions).to(self._device),
        )
        images, sample_ids = self._reader.read(wanted, functools.partial(self._crops, epoch))
        if self._stream is not None and not images.is_cuda:
            images = images.pin_memory().to(self._device, non_blocking=True)
        return Batch(images, masks, sample_ids)

    def _crops(self, epoch: int, indices: Ints, sizes: npt.NDArray[np.int32]) -> Boxes:
        return crop_boxes(self._config.data, seed=self._config.seed, epoch=epoch, indices=indices, sizes=sizes)


class _Reader:
    """Reads images by index and replaces bad ones."""

    def __init__(self, dataset: ImageDataset, config: DataConfig, device: torch.device, max_batch: int) -> None:
        self._dataset = dataset
        self._config = config
        self._decoder = choose_decoder(config, device, max_batch)
        self._pool = ThreadPoolExecutor(config.num_threads, thread_name_prefix="fastjepa-headers")
        self._sizes = np.zeros((len(dataset), 2), np.int32)  # 0: not read yet
        self._bad = np.zeros(len(dataset), bool)
        self.bad_samples = 0

    def read(self, wanted: Ints, boxes: Callable[[Ints, npt.NDArray[np.int32]], Boxes]) -> tuple[Tensor, Ints]:
        """Images, float32 [B, C, H, W], and the indices that they really have, int64 [B].

        Raises:
            DataError: all images of the data set are bad.
        """
        while True:
            indices = self._replace_bad(wanted)
            paths = [self._dataset.path(index) for index in indices]
            try:
                return self._decoder.decode(paths, boxes(indices, self._sizes[indices])), indices
            except BadImages as error:
                self._mark(indices, error.bad)

    def _replace_bad(self, wanted: Ints) -> Ints:
        """The indices, with the next good one in place of a bad one; their sizes are known afterwards."""
        indices = wanted
        while True:
            unknown = np.unique(indices[(self._sizes[indices, 0] == 0) & ~self._bad[indices]])
            if unknown.size:
                paths = [self._dataset.path(index) for index in unknown]
                self._sizes[unknown], bad = read_sizes(
                    paths, self._config.max_pixels, self._pool, self._config.num_threads
                )
                self._mark(unknown, bad)
            if not self._bad[indices].any():
                return indices
            if self.bad_samples == len(self._dataset):
                raise DataError(
                    f"{self._dataset.root}: none of its {self.bad_samples} images can be used; the log has the reasons"
                )
            indices = np.where(self._bad[indices], (indices + 1) % len(self._dataset), indices)

    def _mark(self, indices: Ints, bad: Mapping[int, BadImage]) -> None:
        for position, error in bad.items():
            if not self._bad[indices[position]]:  # a replacement can stand in a batch twice
                self._bad[indices[position]] = True
                self.bad_samples += 1
                _log.warning("bad image, replaced by the next one: %s", error)


def load_images(dataset: ImageDataset, indices: Ints, config: DataConfig, device: torch.device) -> Tensor:
    """Images for evaluation, at their largest central box: float32 [B, C, H, W] on `device`.

    Raises:
        BadImages: some of them cannot be used: figures over another set of images would not be comparable.
    """
    decoder = choose_decoder(config, device, min(len(indices), _EVALUATION_BATCH))
    batches = []
    with ThreadPoolExecutor(config.num_threads) as pool:
        for start in range(0, len(indices), _EVALUATION_BATCH):
            paths = [dataset.path(index) for index in indices[start : start + _EVALUATION_BATCH]]
            sizes, bad = read_sizes(paths, config.max_pixels, pool, config.num_threads)
            if bad:
                raise BadImages(bad)
            batches.append(decoder.decode(paths, central_boxes(sizes, config.image_hw)).to(device))
    return torch.cat(batches)


def choose_decoder(config: DataConfig, device: torch.device, max_batch: int) -> Decoder:
    """The decoder that data.loader asks for; `auto` is DALI where it is installed, else Pillow.

    Raises:
        ConfigError: DALI was asked for and is not installed, or data.in_channels is not one of an image file.
    """
    if config.in_channels not in (1, 3):
        raise ConfigError(f"data.in_channels = {config.in_channels}: expected 3 (RGB) or 1 (grey) for image files")
    return DaliDecoder(config, device, max_batch) if _use_dali(config.loader) else PillowDecoder(config)


@functools.cache  # so that the choice is made, and logged, once
def _use_dali(loader: str) -> bool:
    problem = None if loader == "pillow" else dali_problem()
    if loader == "dali" and problem:
        raise ConfigError(f"data.loader = dali: {problem}; install fastjepa[dali] (Linux), or use data.loader = pillow")
    use_dali = loader != "pillow" and problem is None
    reason = f"data.loader = {loader}" + (f": {problem}" if problem else "")
    _log.info("images are decoded by %s (%s)", "DALI" if use_dali else "Pillow", reason)
    return use_dali


def _tensors(batch: Batch) -> Iterator[Tensor]:
    yield batch.images
    for value in vars(batch.masks).values():
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Ragged):
            yield value.cu_seqlens
