"""The report of `fastjepa check` as text for people."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

_NAMED_IMAGES, _NAMED_GROUPS = 10, 5


def format_report(report: dict[str, Any]) -> str:
    """Write the report that `scan.scan_source` returns as text."""
    how = "headers only, no pixels decoded" if report["headers_only"] else "read and decoded"
    stopped = "" if report["complete"] else ", stopped before the end"
    num_bytes = sum(split["bytes"] for split in report["splits"].values())
    seconds = report["seconds"]
    speed = f"{report['images'] / seconds:,.0f} images/s, {_in_bytes(num_bytes / seconds)}/s, "
    speed += f"{_counted(report['num_threads'], 'thread')}, {seconds:,.1f} s"
    lines = [f"{report['source']}: {_counted(report['images'], 'image')}, {how}{stopped}", *_row("speed", speed)]
    if cost := report["training_cpu_seconds_per_image"]:
        height, width = report["image_size"]
        cost_text = f"{1e3 * cost:.2f} ms of a core to read, decode and crop an image to {_size(width, height)}"
        lines += _row("training", f"{cost_text}: {1 / cost:,.0f} images/s a core")
    for name, split in report["splits"].items():
        lines += ["", *_format_split(name, split, report)]
    if (both := report["in_train_and_val"]) and both["groups"]:
        of_val = _with_share(both["val_images"], report["splits"]["val"]["usable"])
        lines += ["", f"in val and in train: {of_val} of val's images, byte for byte"]
        groups = [
            [f"{split}: {name}" for split in ("val", "train") for name in group[split]] for group in both["named"]
        ]
        lines += _indented(map(" = ".join, groups), _NAMED_GROUPS, both["groups"])
    return "\n".join(lines)


def _format_split(name: str, split: dict[str, Any], report: dict[str, Any]) -> list[str]:
    seen, usable = split["seen"], split["usable"]
    of_them = f", {seen:,} of them seen" if seen < split["images"] else ""
    lines = [f"{name}: {_counted(split['images'], 'image')}{of_them}, {_in_bytes(split['bytes'])}, in {split['root']}"]
    if not seen:
        return lines
    lines += _row("classes", *_format_classes(split["classes"]))
    digits = len(f"{usable:,}")
    lines += _row("formats", *(f"{count:>{digits},} {kind}" for kind, count in split["kinds"].items()))
    if sizes := split["sizes"]:
        lines += _row("sizes", *_format_sizes(sizes, usable))
        lines += _row("largest file", f"{_in_bytes(split['largest_file']['bytes'])}  {split['largest_file']['name']}")
    if split["animated"]:
        lines += _row("animated", f"{_with_share(split['animated'], usable)}: training takes the first frame")
    if split["rotated"]:
        lines += _row(
            "EXIF-rotated", f"{_with_share(split['rotated'], usable)}: training takes the pixels as they are stored"
        )
    lines += _format_duplicates(split["duplicates"])
    if damaged := split["damaged"]:
        lines += _row("damaged", f"{_with_share(len(damaged), seen)}, but training would use what can be decoded:")
        lines += _indented((f"{image['name']}: {image['reason']}" for image in damaged), _NAMED_IMAGES, len(damaged))
    bad = split["bad"]
    if not bad:
        return [*lines, *_row("bad", "none by their headers" if report["headers_only"] else "none")]
    lines += _row(
        "bad",
        f"{_with_share(len(bad), seen)}: {_what_training_would_do(name, len(bad), seen, report['max_bad_share'])}",
    )
    return lines + _indented((f"{image['name']}: {image['reason']}" for image in bad), _NAMED_IMAGES, len(bad))


def _format_classes(classes: dict[str, Any] | None) -> list[str]:
    if classes is None:
        return ["no labels"]
    least, most, unknown = classes["smallest"], classes["largest"], classes["not_in_train"]
    lines = [
        f"{classes['count']:,}, of {least['images']:,} ({least['name']}) to {most['images']:,} images ({most['name']})"
    ]
    if least["images"] == most["images"]:
        lines = [f"{classes['count']:,}, of {_counted(least['images'], 'image')} each"]
    if unknown:
        more = ", ..." if len(unknown) > _NAMED_GROUPS else ""
        lines.append(f"{len(unknown):,} of them not in train: {', '.join(unknown[:_NAMED_GROUPS])}{more}")
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
            f"{_with_share(below['images'], usable)} with a side below {below['pixels']} pixels: training enlarges them"
        )
    return lines


def _format_duplicates(duplicates: dict[str, Any]) -> list[str]:
    if not duplicates["groups"]:
        return _row("duplicates", "none")
    text = f"{_counted(duplicates['groups'], 'group')} with the same bytes, "
    text += f"{_counted(duplicates['surplus'], 'image')} too many"
    if duplicates["groups_of_several_labels"]:
        text += f"; {_counted(duplicates['groups_of_several_labels'], 'group')} under different labels"
    groups = map(" = ".join, duplicates["named"])
    return [*_row("duplicates", text), *_indented(groups, _NAMED_GROUPS, duplicates["groups"])]


def _what_training_would_do(split: str, bad: int, images: int, max_share: float) -> str:
    if split == "val":
        return "the evaluation would leave them out"
    if bad == images or bad > max_share * images:
        return f"TRAINING WOULD STOP, as they are more than data.max_bad_share = {max_share:g}"
    return f"training would put others in their places (up to data.max_bad_share = {max_share:g})"


def _row(label: str, *texts: str) -> list[str]:
    """One line a text, the first with the label before it."""
    return [f"  {'' if i else label:<14}{text}" for i, text in enumerate(texts)]


def _indented(texts: Iterable[str], at_most: int, count: int) -> list[str]:
    """The first `at_most` of `count` texts, indented, and a line that tells how many more there are."""
    shown = [text for text, _ in zip(texts, range(at_most), strict=False)]
    more = [f"... and {count - at_most:,} more (--json FILE names them)"] if count > at_most else []
    return [f"      {text}" for text in shown + more]


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"


def _with_share(count: int, total: int) -> str:
    return f"{count:,} ({100 * count / total:.3g}%)"


def _size(width: int, height: int) -> str:
    return f"{width} x {height}"


def _in_bytes(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.{0 if unit == 'bytes' else 1}f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"
