"""The table of benchmarks.kernels as a picture: a panel for each contest, a bar for each provider, in slow-downs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from math import ceil
from pathlib import Path
from typing import Any

_COLUMNS = 3
_OURS, _OTHERS = "#1b6ca8", "#b8bec6"


def plot(records: Sequence[Mapping[str, Any]], environment: Mapping[str, str], path: Path) -> None:
    """Every contest's providers by median time, as a multiple of the fastest; the line is the 20th to 80th percentile."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    contests = [list(group) for _, group in groupby(records, key=lambda r: (r["op"], r["part"], r["shape"]))]
    longest = max(len(group) for group in contests)
    num_rows = ceil(len(contests) / _COLUMNS)
    figure, axes = plt.subplots(
        num_rows, _COLUMNS, figsize=(6.2 * _COLUMNS, num_rows * (0.9 + 0.34 * longest)), squeeze=False
    )
    for axis, group in zip(axes.flat, contests, strict=False):
        fastest = min(record["p50_ms"] for record in group)
        names = [record["provider"] for record in group]
        medians = [record["p50_ms"] / fastest for record in group]
        spread = [[(record[key] / fastest) for record in group] for key in ("p20_ms", "p80_ms")]
        colours = [_OURS if name.startswith("fastjepa") else _OTHERS for name in names]
        axis.barh(names, medians, color=colours, height=0.66)
        axis.hlines(names, *spread, color="black", linewidth=1)
        for index, record in enumerate(group):
            milliseconds = f"{record['p50_ms']:.3g}" if record["p50_ms"] < 100 else f"{record['p50_ms']:,.0f}"
            label = f" {milliseconds} ms, {100 * record['share_of_bound']:.0f} %"
            axis.text(max(medians[index], spread[1][index]), index, label, va="center", fontsize=8)
        axis.set_ylim(longest - 0.5, -0.5)  # bars of one height in all panels, the fastest on top
        axis.set_xlim(0, max(spread[1]) * 1.45)
        axis.set_title(f"{group[0]['op']}: {group[0]['part']}\n{group[0]['shape']}", fontsize=10, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=9)
    for axis in axes.flat[len(contests) :]:
        axis.set_visible(False)
    details = ", ".join(f"{key} {value}" for key, value in environment.items())
    figure.suptitle(
        f"Time as a multiple of the fastest provider (label: median, share of the machine's bound)\n{details}",
        fontsize=12,
    )
    figure.tight_layout(rect=(0, 0, 1, 0.98))
    figure.savefig(path, dpi=110)
    plt.close(figure)
