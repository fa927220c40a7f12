"""The picture of the report: how fast the operations could be, and what their kernels occupy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from benchmarks.proofs.aot.cases import BATCH_SIZE
from benchmarks.proofs.aot.compiled import resident_fraction
from benchmarks.proofs.aot.roofline import bound
from benchmarks.proofs.aot.variants import TARGETS, Report

_COLOURS = {"sm_80": "#4477aa", "sm_90": "#228833", "sm_100": "#ccbb44", "gfx942": "#aa3377"}
_SHOWN_MODEL = "H/14"


def plot(report: Report, path: Path) -> None:
    kernels = sorted({variant.kernel for variant in report.variants})
    shown = [(c, *each) for c in report.cases if c.model == _SHOWN_MODEL for each in c.passes()]
    height = 1.6 + 0.24 * max(len(shown), 1.5 * len(kernels))
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(18, height), layout="constrained")
    _plot_bounds(left, shown)
    _plot_variants(middle, report, kernels, "registers per thread", registers=True)
    _plot_variants(right, report, kernels, "resident warps, of the most possible", registers=False)
    right.tick_params(labelleft=False)
    figure.legend(*middle.get_legend_handles_labels(), loc="outside lower right", ncols=4, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _plot_bounds(axes: Any, shown: list[Any]) -> None:
    labels = []
    for row, (case, name, work) in enumerate(shown):
        a100, h100 = (bound(work, case.dtype, gpu) for gpu in ("A100", "H100"))
        axes.plot([h100.microseconds, a100.microseconds], [row, row], color="0.75", zorder=1)
        for limit, face in ((a100, "white"), (h100, "#4477aa")):
            marker = "o" if limit.limiter == "memory" else "s"
            axes.scatter(limit.microseconds, row, marker=marker, facecolor=face, edgecolor="#4477aa", zorder=2, s=28)
        labels.append(", ".join(filter(None, (case.op, case.name.removeprefix(_SHOWN_MODEL).strip(), name))))
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    axes.set_xlabel("µs (filled: H100, hollow: A100; circle: memory, square: arithmetic)")
    axes.set_title(f"least time at the data sheet's rates, ViT-{_SHOWN_MODEL}, {BATCH_SIZE} images")


def _plot_variants(axes: Any, report: Report, kernels: list[str], title: str, *, registers: bool) -> None:
    """Draw a dot for each specialisation and configuration, or a cross if it spills."""
    present = [target for target in TARGETS if any(v.compiled.target == target for v in report.variants)]
    for i, target in enumerate(present):
        offset = (i - (len(present) - 1) / 2) * 0.18
        variants = [variant for variant in report.variants if variant.compiled.target == target]
        for spilled, marker in ((False, "o"), (True, "x")):
            chosen = [v for v in variants if (v.compiled.spill_bytes > 0) == spilled]
            axes.scatter(
                [v.compiled.registers if registers else resident_fraction(v.compiled) for v in chosen],
                [kernels.index(v.kernel) + offset for v in chosen],
                marker=marker,
                s=22 if spilled else 12,
                color=_COLOURS[target],
                alpha=0.7,
                label=None if spilled else target,
                linewidth=1.2 if spilled else 0,
            )
    axes.set_yticks(range(len(kernels)), kernels, fontsize=8)
    axes.set_ylim(len(kernels) - 0.5, -0.5)
    axes.set_xlim(0, None if registers else 1.03)
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    for row in range(len(kernels) - 1):
        axes.axhline(row + 0.5, color="0.93", linewidth=0.8)
    axes.set_title(title + (" (x: it spills)" if registers else ""))
