"""The check of a data set: open its splits, look at all images, and gather the report."""

from __future__ import annotations

import dataclasses
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from fastjepa.config import DataConfig
from fastjepa.data.bad_samples import BadSamples
from fastjepa.data.check.describe import describe_images_in_both, describe_split
from fastjepa.data.check.inspector import Inspector
from fastjepa.data.check.tally import Tally
from fastjepa.data.dataset import printable
from fastjepa.data.decode.cpu import CPUDecoder
from fastjepa.data.reader import Reader, ViewDecoder
from fastjepa.data.sources import open_dataset
from fastjepa.errors import DataError

SPLITS: tuple[Literal["train", "val"], ...] = ("train", "val")

_TIMED_IMAGES = 256  # on which the time of training's decoding is measured


def scan_source(
    source: str,
    splits: Iterable[Literal["train", "val"]],
    config: DataConfig,
    *,
    headers_only: bool,
) -> dict[str, Any]:
    """Look at all images of a source. Call it on the main thread: Ctrl-C ends it early, with a report of what was seen.

    Args:
        source: the same as data.source.
        splits: the splits to look at. One that the source lacks is passed over, unless it is the first.
        config: max_pixels and num_threads count for the check; image_size and max_bad_share for what training would do.
        headers_only: decode no pixels.

    Returns:
        The report, as it is written to JSON. `summary.format_report` writes it for people.

    Raises:
        DataError: the source cannot be opened, or lacks the first of the splits.
    """
    config = dataclasses.replace(config, source=source)
    opened = {split: open_dataset(config, split) for split in splits}
    tallies = {split: Tally(dataset) for split, dataset in opened.items() if dataset is not None}
    if missing := [split for split in list(opened)[:1] if split not in tallies]:
        raise DataError(
            f"data.source = {source}: it has no split {missing[0]}; check it without --split, or name the files of the split"
        )
    inspect = Inspector(config, headers_only=headers_only)
    started = time.perf_counter()
    with ThreadPoolExecutor(config.num_threads, thread_name_prefix="fastjepa-check") as pool, _until_ctrl_c() as stop:
        for split, tally in tallies.items():
            if not stop.is_set():
                _scan_split(split, tally, inspect, pool, config.num_threads, stop)
        seconds = time.perf_counter() - started
        first = next(iter(tallies.values()))
        cost = None if headers_only else _training_seconds(first, config, pool, stop)
    seen = sum(tally.seen for tally in tallies.values())
    return {
        "source": printable(source),
        "headers_only": headers_only,
        "complete": seen == sum(len(tally.dataset) for tally in tallies.values()),
        "images": seen,
        "seconds": seconds,
        "num_threads": config.num_threads,
        "max_pixels": config.max_pixels,
        "max_bad_share": config.max_bad_share,
        "image_size": list(config.image_hw),
        "training_cpu_seconds_per_image": cost,
        "splits": {
            split: describe_split(tally, first.dataset.class_names, min(config.image_hw))
            for split, tally in tallies.items()
        },
        "in_train_and_val": describe_images_in_both(**tallies) if len(tallies) == 2 else None,
    }


@contextmanager
def _until_ctrl_c() -> Iterator[threading.Event]:
    """Gives an event that the first Ctrl-C sets. A second Ctrl-C interrupts as usual."""
    stop = threading.Event()
    before = signal.getsignal(signal.SIGINT)

    def on_signal(*_: object) -> None:
        stop.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, on_signal)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def _scan_split(
    split: str, tally: Tally, inspect: Inspector, pool: ThreadPoolExecutor, num_threads: int, stop: threading.Event
) -> None:
    """Look at the images of one split, with a progress bar if there is a terminal."""
    hidden = not sys.stderr.isatty()
    with tqdm(total=len(tally.dataset), desc=split, unit=" images", dynamic_ncols=True, disable=hidden) as bar:

        def progress(more: int) -> None:
            bar.set_postfix_str(f"{len(tally.bad)} bad", refresh=False)
            bar.update(more)

        tally.scan(inspect, pool, num_threads, stop, progress)


def _training_seconds(
    tally: Tally, config: DataConfig, pool: ThreadPoolExecutor, stop: threading.Event
) -> float | None:
    """Seconds of CPU time that training would take to read, decode and crop an image, measured on images from all over the
    split. None if there is no image, or Ctrl-C leaves no time for it."""
    usable = tally.usable
    if not len(usable):
        return None
    sample = usable[np.linspace(0, len(usable) - 1, min(_TIMED_IMAGES, len(usable))).astype(np.int64)]
    bad = BadSamples(tally.dataset, max_share=1.0, path=None)  # an image may have gone bad by now
    view = ViewDecoder(config, CPUDecoder(config, pool))
    reader = Reader(tally.dataset, [view], 0, pool, bad)
    try:
        reader.read(sample[:8], epoch=0)  # a first call takes longer: it is not timed
        started = time.process_time()
        for part in range(0, len(sample), 16):
            if stop.is_set():
                return None
            reader.read(sample[part : part + 16], epoch=0)
    except DataError:  # all images are gone by now: no reason to lose the report
        return None
    return (time.process_time() - started) / len(sample)
