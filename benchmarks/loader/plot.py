"""The picture of the table of benchmarks.loader: a column for each image size, with images per CPU-second above images/s."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.loader.contestants import RIVAL

_SHADES = {"fastjepa": ("#a9cce3", "#1b6ca8", "#0d3b5e"), "DataLoader": ("#d5d8dc", "#979ea6", "#5f666d")}


def plot(records: Sequence[Mapping[str, Any]], environment: Mapping[str, str], path: Path) -> None:
    """Draw medians as bars with lines from the 20th to the 80th percentile, labelled with the ratio to the DataLoader."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    sizes = list(dict.fromkeys(r["image_size"] for r in records))
    threads = sorted({r["threads"] for r in records})
    providers = list(dict.fromkeys(r["provider"] for r in records))
    height = 0.8 / len(threads)
    figure, axes = plt.subplots(
        2,
        len(sizes),
        figsize=(6.6 * len(sizes), 2.4 + 0.34 * len(threads) * 2 * len(providers)),
        squeeze=False,
        sharey=True,
    )
    for row, title in enumerate(("Images per CPU-second", "Images per second")):
        for axis, size in zip(axes[row], sizes, strict=True):
            here = [r for r in records if r["image_size"] == size]
            rival = {r["threads"]: _rates(r, title)[0] for r in here if r["provider"] == RIVAL}
            longest = max(_rates(r, title)[2] for r in here)
            for r in here:
                rate, low, high = _rates(r, title)
                number = threads.index(r["threads"])
                y = providers.index(r["provider"]) + (number - (len(threads) - 1) / 2) * height
                shades = _SHADES[r["provider"].split()[0]]
                axis.barh(y, rate, height, color=shades[number % len(shades)], edgecolor="white", linewidth=0.5)
                axis.hlines(y, low, high, color="black", linewidth=1)
                ratio, plural = rate / rival[r["threads"]], "s" * (r["threads"] > 1)
                label = f"{rate:,.0f}    {ratio:.2f} x    {r['threads']} thread{plural}"
                axis.text(high + 0.015 * longest, y, label, va="center", fontsize=8)
            axis.set_yticks(range(len(providers)), providers)
            axis.set_ylim(len(providers) - 0.5, -0.5)
            axis.set_xlim(0, 1.4 * longest)
            axis.set_title(f"{title}, {size} files", fontsize=11, loc="left")
            axis.spines[["top", "right"]].set_visible(False)
            axis.tick_params(axis="y", length=0)
    figure.suptitle(
        f"From JPEG files to batches of 224 x 224 crops (x: as a multiple of {RIVAL})\n"
        + ", ".join(f"{key} {value}" for key, value in environment.items()),
        fontsize=11,
    )
    figure.tight_layout(rect=(0, 0, 1, 0.99))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _rates(record: Mapping[str, Any], title: str) -> list[float]:
    """Median, 20th and 80th percentile."""
    if title == "Images per second":
        return [record[f"images_per_s{q}"] for q in ("", "_p20", "_p80")]
    return [1e3 / record[f"cpu_ms_per_image{q}"] for q in ("", "_p80", "_p20")]
