"""Pictures of the table of benchmarks.kernels: times side by side, and rates under the machine's measured ceilings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from math import atan2, degrees, log10
from pathlib import Path
from statistics import median
from typing import Any

_COLUMNS = 3
_OURS, _OTHERS = "#1b6ca8", "#aab1ba"
_OUR_SHADES = ("#0b3c5d", "#1b6ca8", "#3f9bd8", "#8cc4ee", "#c2e0f7")
_RIVALS = ("#d1495b", "#edae49", "#66a182", "#8d6a9f", "#7f7f7f", "#bc6c25", "#4f5d75")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")

Record = Mapping[str, Any]


def _contests(records: Sequence[Record]) -> list[list[Record]]:
    return [list(group) for _, group in groupby(records, key=_key)]


def _is_ours(provider: str) -> bool:
    return provider.startswith("fastjepa")


def _details(records: Sequence[Record], environment: Mapping[str, str]) -> str:
    versions = ", ".join(f"{key} {value}" for key, value in environment.items() if value and key != "device")
    return f"{environment['device']}, {versions}, batch {records[0]['batch_size']}"


def _pyplot() -> Any:
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    return plt


def plot_times(records: Sequence[Record], environment: Mapping[str, str], path: Path) -> None:
    """Draw the median times of each contest as multiples of the fastest, with lines from the 20th to the 80th percentile."""
    plt = _pyplot()
    contests = _contests(records)
    rows = [contests[first : first + _COLUMNS] for first in range(0, len(contests), _COLUMNS)]
    heights = [max(len(contest) for contest in row) for row in rows]
    figure, axes = plt.subplots(
        len(rows),
        _COLUMNS,
        figsize=(5.6 * _COLUMNS, 1 + sum(1.1 + 0.28 * height for height in heights)),
        height_ratios=[2 + height for height in heights],
        squeeze=False,
        layout="constrained",
    )
    for axis in axes.flat:
        axis.set_visible(False)
    for row, height, places in zip(rows, heights, axes, strict=True):
        for contest, axis in zip(row, places, strict=False):
            axis.set_visible(True)
            _bars(axis, contest, height)
    title = (
        "Time as a multiple of the fastest (beside the bar: median, share of the machine's bound; in blue: fastjepa)"
    )
    _save(figure, f"{title}\n{_details(records, environment)}", path)


def _save(figure: Any, title: str, path: Path) -> None:
    plt = _pyplot()

    figure.suptitle(title, fontsize=12, x=0.01, ha="left")
    figure.get_layout_engine().set(h_pad=0.1, w_pad=0.15)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _bars(axis: Any, contest: Sequence[Record], height: int) -> None:
    fastest = min(record["p50_ms"] for record in contest)
    room = 1.15 * max(record["p50_ms"] for record in contest) / fastest
    for index, record in enumerate(contest):
        low, middle, high = (record[key] / fastest for key in ("p20_ms", "p50_ms", "p80_ms"))
        axis.barh(index, middle, color=_colour(record), height=0.7)
        axis.hlines(index, low, min(high, room), color="black", linewidth=1)
        label = f"{_short(record['p50_ms'])} ms, {100 * record['share_of_bound']:.0f} %"
        axis.text(max(middle, min(high, room)) + 0.02 * room, index, label, va="center", fontsize=8)
    axis.set_yticks(range(len(contest)), [record["provider"] for record in contest], fontsize=9)
    axis.set_ylim(height - 0.5, -0.5)  # equally high bars in all panels of a row, the fastest on top
    axis.set_xlim(0, room * 1.4)
    axis.set_title(f"{contest[0]['op']}: {contest[0]['part']}\n{contest[0]['shape']}", fontsize=10, loc="left")
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(axis="x", labelsize=8)


def plot_roofline(records: Sequence[Record], environment: Mapping[str, str], path: Path) -> None:
    """Draw a pair of panels for each model.

    The left one has the operations with matrix products: FLOP per byte against the rate, under the roofline of the measured
    copy and matrix product. The right one has those that only move bytes: their rates beside the copy's.
    """
    plt = _pyplot()
    by_model: dict[str, list[list[Record]]] = {}
    for contest in _contests(records):
        by_model.setdefault(contest[0]["shape"].split()[0], []).append(contest)
    styles = _styles([record["provider"] for record in records if record["flops"]])
    heights = [max(4.5, 0.21 * sum(len(c) + 1 for c in group if not c[0]["flops"])) for group in by_model.values()]
    figure, axes = plt.subplots(
        len(by_model), 2, figsize=(15, 1 + sum(heights)), height_ratios=heights, squeeze=False, layout="constrained"
    )
    for (model, contests), (left, right) in zip(by_model.items(), axes, strict=True):
        _roof(left, [contest for contest in contests if contest[0]["flops"]], records, styles)
        _bandwidths(right, [contest for contest in contests if not contest[0]["flops"]], records)
        left.set_title(f"{model}: with matrix products", loc="left", fontsize=11)
        right.set_title(f"{model}: moving bytes only", loc="left", fontsize=11)
    title = "Rates, of the least work that each operation can do, under what this machine reaches at best"
    _save(figure, f"{title}\n{_details(records, environment)}", path)


def _roof(
    axis: Any,
    contests: Sequence[Sequence[Record]],
    every_record: Sequence[Record],
    styles: Mapping[str, dict[str, Any]],
) -> None:
    bandwidth = _ceiling(every_record, "copy_gb_per_s") / 1e3  # TB/s
    peak = _ceiling(every_record, "matmul_tflop_per_s")
    unit, scale = ("TFLOP/s", 1.0) if peak >= 1 else ("GFLOP/s", 1e3)
    ridge = peak / bandwidth
    intensities = [contest[0]["flops"] / contest[0]["bytes"] for contest in contests]
    left, right = min([*intensities, ridge]) / 3, max([*intensities, ridge]) * 2
    axis.plot([left, ridge, right], [scale * y for y in (left * bandwidth, peak, peak)], color="#333333", zorder=1)
    axis.text(right, 1.07 * scale * peak, f"matrix product, {_short(scale * peak)} {unit}", fontsize=9, ha="right")
    axis.text(
        1.1 * left,
        1.3 * 1.1 * scale * left * bandwidth,
        f"copy, {_short(1e3 * bandwidth)} GB/s",
        fontsize=9,
        rotation=degrees(atan2(scale * bandwidth, 1)),
        rotation_mode="anchor",
        transform_rotates_text=True,
    )
    slowest = min([scale * record["tflop_per_s"] for contest in contests for record in contest], default=scale * peak)
    top = 1.6 * scale * peak
    bottom = slowest / 10 ** (0.6 * log10(top / slowest))  # leaves room for the names under the marks
    for contest, intensity in zip(contests, intensities, strict=True):
        for record in contest:
            axis.plot(intensity, scale * record["tflop_per_s"], linestyle="", zorder=3, **styles[record["provider"]])
        roof = scale * min(peak, intensity * bandwidth)
        lowest = scale * min(record["tflop_per_s"] for record in contest)
        axis.vlines(intensity, lowest, roof, color="#bbbbbb", linewidth=0.8, linestyle=":", zorder=0)
        place = contest[0]["shape"].split()[1]
        name = f"{place}, {contest[0]['part']}"
        offset = {"xytext": (0, -9), "textcoords": "offset points"}
        axis.annotate(name, (intensity, lowest), **offset, rotation=90, ha="center", va="top", fontsize=8.5)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlim(left, right)
    axis.set_ylim(bottom, top)
    axis.set_xlabel("FLOP per byte")
    axis.set_ylabel(unit)
    present = {record["provider"] for contest in contests for record in contest}
    marks = [axis.plot([], [], linestyle="", label=name, **styles[name])[0] for name in styles if name in present]
    if marks:
        side = "left" if ridge < max(intensities) else "right"  # the side without marks
        axis.legend(handles=marks, loc=f"lower {side}", fontsize=9, framealpha=1, edgecolor="white")
    _grid(axis, axis.xaxis, axis.yaxis)


def _bandwidths(axis: Any, contests: Sequence[Sequence[Record]], every_record: Sequence[Record]) -> None:
    """Draw a row for each provider, under a row with the name of the contest."""
    rows = [row for contest in contests for row in (contest[0], *contest)]
    titles = {index for index, row in enumerate(rows) if index == 0 or _key(row) != _key(rows[index - 1])}
    for index, row in enumerate(rows):
        if index not in titles:
            axis.hlines(index, 0, row["gb_per_s"], color="#e3e6ea", linewidth=1, zorder=0)
            axis.plot(row["gb_per_s"], index, "o", color=_colour(row), zorder=3)
    names = [f"{row['op']}: {row['part']}" if index in titles else row["provider"] for index, row in enumerate(rows)]
    axis.set_yticks(range(len(rows)), names, fontsize=8.5)
    for index, label in enumerate(axis.get_yticklabels()):
        label.set_weight("bold" if index in titles else "normal")
    axis.tick_params(axis="y", length=0)
    axis.set_ylim(max(len(rows), 1) - 0.5, -1)
    if contests:
        copy = _ceiling(every_record, "copy_gb_per_s")
        axis.axvline(copy, color="#333333", linewidth=1.5, zorder=1)
        axis.text(copy, -1.1, f"copy, {_short(copy)} GB/s", ha="center", va="bottom", fontsize=9)
        axis.set_xlim(min(row["gb_per_s"] for row in rows) / 2, 2 * max(copy, *(row["gb_per_s"] for row in rows)))
    axis.set_xscale("log")
    axis.set_xlabel("GB/s (above the copy: from the caches, or in place)")
    _grid(axis, axis.xaxis)


def _key(record: Record) -> tuple[str, ...]:
    return record["op"], record["part"], record["shape"]


def _ceiling(records: Sequence[Record], name: str) -> float:
    """The median of a ceiling, which every contest measured."""
    return median(record[name] for record in records)


def _short(x: float) -> str:
    return f"{x:.3g}" if x < 100 else f"{x:,.0f}"


def _colour(record: Record) -> str:
    return _OURS if _is_ours(record["provider"]) else _OTHERS


def _styles(providers: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colour and marker of every provider, fastjepa's first."""
    ours = list(dict.fromkeys(name for name in providers if _is_ours(name)))
    rivals = list(dict.fromkeys(name for name in providers if not _is_ours(name)))
    colours = dict(zip([*ours, *rivals], [*_OUR_SHADES[: len(ours)], *_RIVALS], strict=False))
    looks = {"markersize": 8, "markeredgecolor": "white", "markeredgewidth": 0.6}
    return {
        name: {"color": colour, "marker": _MARKERS[index % len(_MARKERS)], **looks}
        for index, (name, colour) in enumerate(colours.items())
    }


def _grid(axis: Any, *logarithmic: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    for one in logarithmic:
        one.set_major_locator(LogLocator(subs=(1, 2, 5)))
        one.set_minor_locator(NullLocator())
        one.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="x" if len(logarithmic) == 1 else "both", color="#eeeeee")
    axis.set_axisbelow(True)
