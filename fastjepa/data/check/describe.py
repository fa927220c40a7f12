"""The part of the report about the images of a split, or of both, from what was found in them (`Tally`)."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastjepa.data.check.tally import Tally, same_bytes
from fastjepa.data.dataset import Ints, printable

# The report names all bad images, but only so many groups of duplicates, and so many images of each.
_NAMED_GROUPS, _NAMED_IN_A_GROUP = 100_000, 100


def describe_split(tally: Tally, train_classes: tuple[str, ...], crop_side: int) -> dict[str, Any]:
    """Describe what was found in one split.

    Args:
        tally: what was found.
        train_classes: the class names of the split that is trained on.
        crop_side: the shorter side of data.image_size, in pixels: training enlarges what is smaller.
    """
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
        "sizes": _sizes(tally, crop_side) if len(tally.usable) else None,
        "largest_file": {"bytes": num_bytes, "name": dataset.name(largest)} if num_bytes else None,
        "animated": tally.animated,
        "rotated": tally.rotated,
        "duplicates": _duplicates(tally),
        "damaged": _named(tally, tally.damaged),
        "bad": _named(tally, tally.bad),
    }


def describe_images_in_both(train: Tally, val: Tally) -> dict[str, Any]:
    """Describe the images that stand in both splits, byte for byte."""
    train_rows, val_rows = train.usable, val.usable
    order, starts, ends = same_bytes(np.concatenate([train.digests[train_rows], val.digests[val_rows]]))
    num_train = len(train_rows)  # in `order`, smaller numbers are images of train, the others images of val
    both = (order[starts] < num_train) & (order[ends - 1] >= num_train)
    val_before = np.concatenate([[0], np.cumsum(order >= num_train)])  # images of val before each place in `order`
    named = []
    for start, end in zip(starts[both][:_NAMED_GROUPS], ends[both][:_NAMED_GROUPS], strict=True):
        group = order[start:end]
        in_train, in_val = train_rows[group[group < num_train]], val_rows[group[group >= num_train] - num_train]
        named.append({"train": _names(train, in_train), "val": _names(val, in_val)})
    val_images = int((val_before[ends] - val_before[starts])[both].sum())
    return {"groups": int(both.sum()), "val_images": val_images, "named": named}


def _classes(labels: Ints, names: tuple[str, ...], train_classes: tuple[str, ...]) -> dict[str, Any]:
    counts = np.bincount(labels, minlength=len(names))
    least, most = int(counts.argmin()), int(counts.argmax())
    return {
        "count": len(names),
        "smallest": {"name": names[least], "images": int(counts[least])},
        "largest": {"name": names[most], "images": int(counts[most])},
        "not_in_train": sorted(set(names) - set(train_classes)),
    }


def _sizes(tally: Tally, crop_side: int) -> dict[str, Any]:
    usable = tally.usable
    sizes = tally.sizes[usable]
    by_area = np.argsort(sizes.prod(1, dtype=np.int64), kind="stable")

    def size_at(position: int) -> dict[str, int]:
        height, width = sizes[by_area[position]].tolist()
        return {"width": width, "height": height}

    def size_and_name_at(position: int) -> dict[str, Any]:
        return size_at(position) | {"name": tally.dataset.name(int(usable[by_area[position]]))}

    below = {"pixels": crop_side, "images": int((sizes.min(1) < crop_side).sum())}
    return {
        "smallest": size_and_name_at(0),
        "median": size_at((len(usable) - 1) // 2),
        "largest": size_and_name_at(-1),
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


def _names(tally: Tally, indices: Ints) -> list[str]:
    return [tally.dataset.name(int(index)) for index in indices[:_NAMED_IN_A_GROUP]]


def _named(tally: Tally, reasons: dict[int, str]) -> list[dict[str, Any]]:
    return [{"index": i, "name": tally.dataset.name(i), "reason": reason} for i, reason in sorted(reasons.items())]
