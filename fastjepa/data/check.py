"""python -m fastjepa.data.check SOURCE: looks at every image of a data set before a run does, and reports what is there.

Every image is decoded completely, which alone finds all damage; with --headers files are read, but no pixels decoded.
Bad is what `Reader` and `TurboDecoder` call bad: it is their code that judges. All figures are of usable images.

Exit status: 0: no image is bad; 1: some are; 2: an error; 130: stopped with Ctrl-C, after a report of what was seen.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from fastjepa.config import DataConfig
from fastjepa.data.bad_samples import BadSamples
from fastjepa.data.dataset import Ints
from fastjepa.data.reader import Reader
from fastjepa.data.sources import open_dataset
from fastjepa.data.tally import Inspector, Tally, same_bytes
from fastjepa.data.turbo import TurboDecoder
from fastjepa.errors import DataError, FastjepaError

_SPLITS: tuple[Literal["train", "val"], ...] = ("train", "val")
_TIMED = 256  # images on which the cost of training's decoding is measured

# How many are named in the report for people; and how many duplicates in the JSON, which names all bad images.
_NAMED_IMAGES, _NAMED_GROUPS = 10, 5
_GROUPS_IN_JSON, _IMAGES_OF_A_GROUP = 100_000, 100


def check(
    source: str,
    splits: Iterable[Literal["train", "val"]],
    config: DataConfig,
    *,
    headers_only: bool,
    stop: threading.Event,
) -> dict[str, Any]:
    """Look at the images of a source.

    Args:
        source: as data.source.
        splits: which ones; those that the source lacks are passed over, but for the first.
        config: max_pixels and num_threads count here; image_size and max_bad_share for what training would do.
        headers_only: decode no pixels.
        stop: when set, the report is of what was seen until then.

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
    with ThreadPoolExecutor(config.num_threads, thread_name_prefix="fastjepa-check") as pool:
        for split, tally in tallies.items():
            with _bar(split, tally) as bar:
                tally.scan(inspect, pool, config.num_threads, stop, bar.update)
        seconds = time.perf_counter() - started
        first = next(iter(tallies.values()))
        cost = None if headers_only or stop.is_set() else _training_seconds(first, config, pool)
    seen = sum(tally.seen for tally in tallies.values())
    return {
        "source": _printable(source),
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


def _bar(split: str, tally: Tally) -> tqdm[None]:
    """On a terminal only."""
    hidden = not sys.stderr.isatty()
    return tqdm(total=len(tally.dataset), desc=split, unit=" images", dynamic_ncols=True, disable=hidden)


def _training_seconds(tally: Tally, config: DataConfig, pool: ThreadPoolExecutor) -> float | None:
    """CPU time per image that training would take to read, decode and crop, measured on images from all over the set."""
    usable = tally.usable
    if not len(usable):
        return None
    sample = usable[np.linspace(0, len(usable) - 1, min(_TIMED, len(usable))).astype(np.int64)]
    bad = BadSamples(tally.dataset, max_share=1.0, path=None)  # one may have gone bad by now
    reader = Reader(tally.dataset, config, 0, TurboDecoder(config, pool), pool, bad)
    reader.read(sample[:8], epoch=0)  # the first call of anything takes longer
    started = time.process_time()
    for part in range(0, len(sample), 16):
        reader.read(sample[part : part + 16], epoch=0)
    return (time.process_time() - started) / len(sample)


def _describe(tally: Tally, train_classes: tuple[str, ...], crop: int) -> dict[str, Any]:
    dataset, labels = tally.dataset, tally.dataset.labels
    num_bytes, largest = tally.largest_file
    return {
        "root": _printable(dataset.root),
        "images": len(dataset),
        "seen": tally.seen,
        "usable": len(tally.usable),
        "bytes": tally.num_bytes,
        "classes": None if labels is None else _classes(labels, dataset.class_names, train_classes),
        "kinds": dict(tally.kinds.most_common()),
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

    def of(position: int) -> dict[str, Any]:
        height, width = sizes[by_area[position]].tolist()
        return {"width": width, "height": height, "name": tally.dataset.name(int(usable[by_area[position]]))}

    below = {"pixels": crop, "images": int((sizes.min(1) < crop).sum())}
    return {"smallest": of(0), "median": of((len(usable) - 1) // 2), "largest": of(-1), "a_side_below": below}


def _duplicates(tally: Tally) -> dict[str, Any]:
    usable, labels = tally.usable, tally.dataset.labels
    order, starts, ends = same_bytes(tally.digests[usable])
    indices = usable[order]
    several_labels = 0
    if labels is not None:
        change = np.cumsum(np.diff(labels[indices], prepend=0) != 0)
        several_labels = int((change[ends - 1] > change[starts]).sum())
    first = zip(starts[:_GROUPS_IN_JSON], ends[:_GROUPS_IN_JSON], strict=True)
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
    for start, end in zip(starts[both][:_GROUPS_IN_JSON], ends[both][:_GROUPS_IN_JSON], strict=True):
        group = order[start:end]
        in_train, in_val = rows[0][group[group < border]], rows[1][group[group >= border] - border]
        named.append({"train": _names(train, in_train), "val": _names(val, in_val)})
    return {"groups": int(both.sum()), "val_images": int((of_val[ends] - of_val[starts])[both].sum()), "named": named}


def _names(tally: Tally, indices: Ints) -> list[str]:
    return [tally.dataset.name(int(index)) for index in indices[:_IMAGES_OF_A_GROUP]]


def _named(tally: Tally, reasons: dict[int, str]) -> list[dict[str, Any]]:
    return [{"index": i, "name": tally.dataset.name(i), "reason": reason} for i, reason in sorted(reasons.items())]


def _printable(path: str) -> str:
    return path.encode("utf-8", "backslashreplace").decode()


def format_report(report: dict[str, Any]) -> str:
    """What people read."""
    how = "headers only, no pixels decoded" if report["headers_only"] else "read and decoded"
    stopped = "" if report["complete"] else ", stopped before the end"
    num_bytes = sum(split["bytes"] for split in report["splits"].values())
    seconds = report["seconds"]
    speed = f"{report['images'] / seconds:,.0f} images/s, {_bytes(num_bytes / seconds)}/s, "
    speed += f"{_count(report['num_threads'], 'thread')}, {seconds:,.1f} s"
    lines = [f"{report['source']}: {_count(report['images'], 'image')}, {how}{stopped}", *_row("speed", speed)]
    if cost := report["training_cpu_seconds_per_image"]:
        cost_text = f"{1e3 * cost:.2f} ms of a core to read, decode and crop an image to {_size(*report['image_size'])}"
        lines += _row("training", f"{cost_text}: {1 / cost:,.0f} images/s a core")
    for name, split in report["splits"].items():
        lines += ["", *_format_split(name, split, report)]
    if (both := report["in_train_and_val"]) and both["groups"]:
        of_val = _share(both["val_images"], report["splits"]["val"]["usable"])
        lines += ["", f"in val and in train: {of_val} of val's images, byte for byte"]
        groups = [
            [f"{split}: {name}" for split in ("val", "train") for name in group[split]] for group in both["named"]
        ]
        lines += _first(map(" = ".join, groups), _NAMED_GROUPS, both["groups"])
    return "\n".join(lines)


def _format_split(name: str, split: dict[str, Any], report: dict[str, Any]) -> list[str]:
    seen, usable = split["seen"], split["usable"]
    of_them = f", {seen:,} of them seen" if seen < split["images"] else ""
    lines = [f"{name}: {_count(split['images'], 'image')}{of_them}, {_bytes(split['bytes'])}, in {split['root']}"]
    lines += _row("classes", *_format_classes(split["classes"]))
    digits = len(f"{usable:,}")
    lines += _row("formats", *(f"{count:>{digits},} {kind}" for kind, count in split["kinds"].items()))
    if sizes := split["sizes"]:
        lines += _row("sizes", *_format_sizes(sizes, usable))
        lines += _row("largest file", f"{_bytes(split['largest_file']['bytes'])}  {split['largest_file']['name']}")
    if split["animated"]:
        lines += _row("animated", f"{_share(split['animated'], usable)}: training takes the first frame")
    if split["rotated"]:
        lines += _row(
            "EXIF-rotated", f"{_share(split['rotated'], usable)}: training takes the pixels as they are stored"
        )
    lines += _format_duplicates(split["duplicates"])
    if damaged := split["damaged"]:
        lines += _row("damaged", f"{_share(len(damaged), seen)}, but training would use what can be decoded:")
        lines += _first((f"{image['name']}: {image['reason']}" for image in damaged), _NAMED_IMAGES, len(damaged))
    bad = split["bad"]
    if not bad:
        return [*lines, *_row("bad", "none by their headers" if report["headers_only"] else "none")]
    lines += _row("bad", f"{_share(len(bad), seen)}: {_what_then(name, len(bad), seen, report['max_bad_share'])}")
    return lines + _first((f"{image['name']}: {image['reason']}" for image in bad), _NAMED_IMAGES, len(bad))


def _format_classes(classes: dict[str, Any] | None) -> list[str]:
    if classes is None:
        return ["no labels"]
    least, most, unknown = classes["smallest"], classes["largest"], classes["not_in_train"]
    lines = [
        f"{classes['count']:,}, of {least['images']:,} ({least['name']}) to {most['images']:,} images ({most['name']})"
    ]
    if least["images"] == most["images"]:
        lines = [f"{classes['count']:,}, of {_count(least['images'], 'image')} each"]
    if unknown:
        lines.append(
            f"{len(unknown):,} of them not in train: {', '.join(unknown[:_NAMED_GROUPS])}{', ...' * (len(unknown) > 5)}"
        )
    return lines


def _format_sizes(sizes: dict[str, Any], usable: int) -> list[str]:
    small, median, large = (sizes[which] for which in ("smallest", "median", "largest"))
    lines = [f"all {_size(small['width'], small['height'])} (width x height)"]
    if (small["width"], small["height"]) != (large["width"], large["height"]):
        lines = [
            f"smallest {_size(small['width'], small['height']):<13} {small['name']}",
            f"median   {_size(median['width'], median['height']):<13} (width x height, by area)",
            f"largest  {_size(large['width'], large['height']):<13} {large['name']}",
        ]
    below = sizes["a_side_below"]
    if below["images"]:
        lines.append(
            f"{_share(below['images'], usable)} with a side below {below['pixels']} pixels: training enlarges them"
        )
    return lines


def _format_duplicates(duplicates: dict[str, Any]) -> list[str]:
    if not duplicates["groups"]:
        return _row("duplicates", "none")
    text = f"{_count(duplicates['groups'], 'group')} with the same bytes, {_count(duplicates['surplus'], 'image')} too many"
    if duplicates["groups_of_several_labels"]:
        text += f"; {_count(duplicates['groups_of_several_labels'], 'group')} under different labels"
    groups = map(" = ".join, duplicates["named"])
    return [*_row("duplicates", text), *_first(groups, _NAMED_GROUPS, duplicates["groups"])]


def _what_then(split: str, bad: int, images: int, max_share: float) -> str:
    if split == "val":
        return "the evaluation would leave them out"
    if bad == images or bad > max_share * images:
        return f"TRAINING WOULD STOP, as they are more than data.max_bad_share = {max_share:g}"
    return f"training would put others in their places (up to data.max_bad_share = {max_share:g})"


def _row(label: str, *texts: str) -> list[str]:
    return [f"  {'' if i else label:<14}{text}" for i, text in enumerate(texts)]


def _first(texts: Iterable[str], at_most: int, count: int) -> list[str]:
    shown = [text for text, _ in zip(texts, range(at_most), strict=False)]
    more = [f"... and {count - at_most:,} more (--json FILE names them)"] if count > at_most else []
    return [f"      {text}" for text in shown + more]


def _count(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"


def _share(count: int, total: int) -> str:
    return f"{count:,} ({100 * count / total:.3g}%)"


def _size(width: int, height: int) -> str:
    return f"{width} x {height}"


def _bytes(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.{0 if unit == 'bytes' else 1}f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m fastjepa.data.check", description="Look at every image of a data set before a run does."
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parser.add_argument("source", help="as data.source: a folder, tar shards, tables, a list, or fashion_mnist")
    parser.add_argument("--split", choices=_SPLITS, help="only this one (default: both, and what they share)")
    parser.add_argument("--headers", action="store_true", help="read the files, but decode no pixels: fast, finds less")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the report there too, with more names")
    parser.add_argument("--num_threads", type=int, default=cores, help="default: one for each core")
    parser.add_argument(
        "--max_pixels", type=int, default=DataConfig.max_pixels, help="as data.max_pixels (default: %(default)s)"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    warnings.filterwarnings("ignore", module=r"PIL\.")  # about single files, in between the lines
    try:
        config = DataConfig(num_threads=args.num_threads, max_pixels=args.max_pixels)
        if args.json:
            _write(args.json, "", "a")  # an error comes now, not after hours
        with _until_ctrl_c() as stop:
            splits = (args.split,) if args.split else _SPLITS
            report = check(args.source, splits, config, headers_only=args.headers, stop=stop)
        print(format_report(report), flush=True)
        if args.json:
            _write(args.json, json.dumps(report, indent=2) + "\n", "w")
    except FastjepaError as error:
        print(f"fastjepa: error: {error}", file=sys.stderr)
        return 2
    if not report["complete"]:
        return 130
    return 1 if any(split["bad"] for split in report["splits"].values()) else 0


def _write(path: Path, text: str, mode: Literal["a", "w"]) -> None:
    try:
        with path.open(mode, encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise DataError(f"--json {path}: cannot be written ({error.strerror})") from error


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


if __name__ == "__main__":
    sys.exit(main())
