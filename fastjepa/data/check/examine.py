"""python -m fastjepa.data.check SOURCE: looks at every image of a data set before a run does, and reports what is there.

Every image is decoded completely, which alone finds all damage; with --headers files are read, but no pixels decoded.
Bad is what `Reader` and `TurboDecoder` call bad: it is their code that judges. All figures are of usable images.

Exit status: 0: no image is bad; 1: some are; 2: an error; 130: stopped with Ctrl-C, after a report of what was seen.
"""

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
from fastjepa.data.check.tally import Inspector, Tally, same_bytes
from fastjepa.data.dataset import Ints, printable
from fastjepa.data.decode.cpu import TurboDecoder
from fastjepa.data.reader import Reader, ViewDecoder
from fastjepa.data.sources import open_dataset
from fastjepa.errors import DataError

_SPLITS: tuple[Literal["train", "val"], ...] = ("train", "val")


_TIMED = 256  # images on which the cost of training's decoding is measured


_NAMED_GROUPS, _NAMED_IN_A_GROUP = 100_000, 100  # of duplicates; bad images are all named


def check(
    source: str,
    splits: Iterable[Literal["train", "val"]],
    config: DataConfig,
    *,
    headers_only: bool,
) -> dict[str, Any]:
    """Look at the images of a source. On the main thread: Ctrl-C ends it early, with a report of what was seen.

    Args:
        source: as data.source.
        splits: which ones; those that the source lacks are passed over, but for the first.
        config: max_pixels and num_threads count here; image_size and max_bad_share for what training would do.
        headers_only: decode no pixels.

    Returns:
        The report, as it is written to JSON; `format_report` is for people.

    Raises:
        DataError: the source cannot be opened, or lacks the first of the splits.
    """
    config = dataclasses.replace(config, source=source)
    opened = {split: open_dataset(config, split) for split in splits}
    tallies = {split: Tally(dataset) for split, dataset in opened.items() if dataset is not None}
    if missing := [split for split in list(opened)[:1] if split not in tallies]:
        raise DataError(f"data.source = {source}: it has no split {missing[0]}")
    inspect = Inspector(config, headers_only=headers_only)
    started = time.perf_counter()
    with ThreadPoolExecutor(config.num_threads, thread_name_prefix="fastjepa-check") as pool, _until_ctrl_c() as stop:
        for split, tally in tallies.items():
            if not stop.is_set():
                _scan(split, tally, inspect, pool, config.num_threads, stop)
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
            split: _describe(tally, first.dataset.class_names, min(config.image_hw)) for split, tally in tallies.items()
        },
        "in_train_and_val": _in_both(**tallies) if len(tallies) == 2 else None,
    }


@contextmanager
def _until_ctrl_c() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets; a second one interrupts, as it always does."""
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


def _scan(
    split: str, tally: Tally, inspect: Inspector, pool: ThreadPoolExecutor, num_threads: int, stop: threading.Event
) -> None:
    """With a bar, if there is a terminal."""
    hidden = not sys.stderr.isatty()
    with tqdm(total=len(tally.dataset), desc=split, unit=" images", dynamic_ncols=True, disable=hidden) as bar:

        def progress(more: int) -> None:
            bar.set_postfix_str(f"{len(tally.bad)} bad", refresh=False)
            bar.update(more)

        tally.scan(inspect, pool, num_threads, stop, progress)


def _training_seconds(
    tally: Tally, config: DataConfig, pool: ThreadPoolExecutor, stop: threading.Event
) -> float | None:
    """CPU time per image that training would take to read, decode and crop, measured on images from all over the set; None
    if there is no time, or no image, for it."""
    usable = tally.usable
    if not len(usable):
        return None
    sample = usable[np.linspace(0, len(usable) - 1, min(_TIMED, len(usable))).astype(np.int64)]
    bad = BadSamples(tally.dataset, max_share=1.0, path=None)  # one may have gone bad by now
    view = ViewDecoder(config, TurboDecoder(config, pool))
    reader = Reader(tally.dataset, [view], 0, pool, bad)
    try:
        reader.read(sample[:8], epoch=0)  # the first call of anything takes longer
        started = time.process_time()
        for part in range(0, len(sample), 16):
            if stop.is_set():
                return None
            reader.read(sample[part : part + 16], epoch=0)
    except DataError:  # all are gone: no reason to lose the report
        return None
    return (time.process_time() - started) / len(sample)


def _describe(tally: Tally, train_classes: tuple[str, ...], crop: int) -> dict[str, Any]:
    dataset, labels = tally.dataset, tally.dataset.labels
    num_bytes, largest = tally.largest_file
    return {
        "root": printable(dataset.root),
        "images": len(dataset),
        "seen": tally.seen,
        "usable": len(tally.usable),
        "bytes": tally.num_bytes,
        "classes": None if labels is None else _classes(labels, dataset.class_names, train_classes),
        "kinds": dict(sorted(tally.kinds.items(), key=lambda kind: (-kind[1], kind[0]))),
        "sizes": _sizes(tally, crop) if len(tally.usable) else None,
        "largest_file": {"bytes": num_bytes, "name": dataset.name(largest)} if num_bytes else None,
        "animated": tally.animated,
        "rotated": tally.rotated,
        "duplicates": _duplicates(tally),
        "damaged": _named(tally, tally.damaged),
        "bad": _named(tally, tally.bad),
    }


def _classes(labels: Ints, names: tuple[str, ...], train_classes: tuple[str, ...]) -> dict[str, Any]:
    counts = np.bincount(labels, minlength=len(names))
    least, most = int(counts.argmin()), int(counts.argmax())
    return {
        "count": len(names),
        "smallest": {"name": names[least], "images": int(counts[least])},
        "largest": {"name": names[most], "images": int(counts[most])},
        "not_in_train": sorted(set(names) - set(train_classes)),
    }


def _sizes(tally: Tally, crop: int) -> dict[str, Any]:
    usable = tally.usable
    sizes = tally.sizes[usable]
    by_area = np.argsort(sizes.prod(1, dtype=np.int64), kind="stable")

    def of(position: int) -> dict[str, int]:
        height, width = sizes[by_area[position]].tolist()
        return {"width": width, "height": height}

    def named(position: int) -> dict[str, Any]:
        return of(position) | {"name": tally.dataset.name(int(usable[by_area[position]]))}

    below = {"pixels": crop, "images": int((sizes.min(1) < crop).sum())}
    return {
        "smallest": named(0),
        "median": of((len(usable) - 1) // 2),
        "largest": named(-1),
        "a_side_below": below,
    }


def _duplicates(tally: Tally) -> dict[str, Any]:
    usable, labels = tally.usable, tally.dataset.labels
    order, starts, ends = same_bytes(tally.digests[usable])
    indices = usable[order]
    several_labels = 0
    if labels is not None:
        change = np.cumsum(np.diff(labels[indices], prepend=0) != 0)
        several_labels = int((change[ends - 1] > change[starts]).sum())
    first = zip(starts[:_NAMED_GROUPS], ends[:_NAMED_GROUPS], strict=True)
    return {
        "groups": len(starts),
        "surplus": int((ends - starts - 1).sum()),
        "groups_of_several_labels": several_labels,
        "named": [_names(tally, indices[start:end]) for start, end in first],
    }


def _in_both(train: Tally, val: Tally) -> dict[str, Any]:
    rows = train.usable, val.usable
    order, starts, ends = same_bytes(np.concatenate([train.digests[rows[0]], val.digests[rows[1]]]))
    border = len(rows[0])
    both = (order[starts] < border) & (order[ends - 1] >= border)
    of_val = np.concatenate([[0], np.cumsum(order >= border)])
    named = []
    for start, end in zip(starts[both][:_NAMED_GROUPS], ends[both][:_NAMED_GROUPS], strict=True):
        group = order[start:end]
        in_train, in_val = rows[0][group[group < border]], rows[1][group[group >= border] - border]
        named.append({"train": _names(train, in_train), "val": _names(val, in_val)})
    return {"groups": int(both.sum()), "val_images": int((of_val[ends] - of_val[starts])[both].sum()), "named": named}


def _names(tally: Tally, indices: Ints) -> list[str]:
    return [tally.dataset.name(int(index)) for index in indices[:_NAMED_IN_A_GROUP]]


def _named(tally: Tally, reasons: dict[int, str]) -> list[dict[str, Any]]:
    return [{"index": i, "name": tally.dataset.name(i), "reason": reason} for i, reason in sorted(reasons.items())]
