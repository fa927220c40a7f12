"""Plots as text for an HTML page: bars in HTML, which stay readable on a phone, and lines in SVG.

Colours are CSS variables of the page (report.html), so that they follow its light and dark mode.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple


class Piece(NamedTuple):
    """A bar, or a piece of a stacked one."""

    name: str
    value: float
    label: str
    colour: str
    """Name of a CSS variable of the page, such as --blue."""


def stacked_bar(pieces: Sequence[Piece], title: str) -> str:
    """One bar of all pieces, with their names and labels below it."""
    total = sum(piece.value for piece in pieces) or 1.0
    shown = [piece for piece in pieces if piece.value > 0]
    bar = "".join(
        f'<span style="flex:{piece.value / total:.5f} 0 0;background:var({piece.colour})" '
        f'title="{escape(piece.name)}: {escape(piece.label)}"></span>'
        for piece in shown
    )
    legend = "".join(
        f'<li><i style="background:var({piece.colour})"></i><span>{escape(piece.name)}</span>'
        f"<b>{escape(piece.label)}</b></li>"
        for piece in pieces
    )
    return f'<div class="bar" role="img" aria-label="{escape(title)}">{bar}</div><ul class="legend">{legend}</ul>'


def bars(pieces: Sequence[Piece], largest: float) -> str:
    """A bar for each piece. A bar of value `largest` has the full width."""
    rows = "".join(
        f'<div class="row"><span>{escape(piece.name)}</span><b>{escape(piece.label)}</b>'
        f'<div class="track"><div style="width:{100 * min(1.0, piece.value / largest):.2f}%;'
        f'background:var({piece.colour})"></div></div></div>'
        for piece in pieces
    )
    return f'<div class="bars">{rows}</div>'


WIDTH, HEIGHT = 420, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 16, 18, 38


class Line(NamedTuple):
    name: str
    ys: Sequence[float]
    colour: str


def line_plot(
    xs: Sequence[float], lines: Sequence[Line], *, title: str, x_label: str, marked: float | None = None
) -> str:
    """Lines over the same xs, whose axis is logarithmic. A dashed vertical line is drawn at the x `marked`."""
    ticks = nice_ticks(max(y for line in lines for y in line.ys))
    low, high = math.log2(xs[0]), math.log2(xs[-1])

    def x_at(x: float) -> float:
        share = (math.log2(x) - low) / (high - low) if high > low else 0.5
        return _LEFT + 10 + share * (WIDTH - _LEFT - _RIGHT - 20)

    def y_at(y: float) -> float:
        return HEIGHT - _BOTTOM - y / ticks[-1] * (HEIGHT - _TOP - _BOTTOM)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    for tick in ticks:
        y = y_at(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:,g}</text>')
    for x in xs[::-1][:: 1 + len(xs) // 10]:  # at most ten labels, so that they do not touch
        parts.append(f'<text x="{x_at(x):.1f}" y="{HEIGHT - 20}" text-anchor="middle">{x:g}</text>')
    parts.append(f'<text x="{(WIDTH + _LEFT) / 2}" y="{HEIGHT - 3}" text-anchor="middle">{escape(x_label)}</text>')
    if marked is not None:
        x = x_at(marked)
        parts.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP - 6}" y2="{HEIGHT - _BOTTOM}"/>')
    for line in lines:
        points = [(x_at(x), y_at(y)) for x, y in zip(xs, line.ys, strict=True)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{path}" style="stroke:var({line.colour})"/>')
        for (x, y), at, value in zip(points, xs, line.ys, strict=True):
            hint = f"<title>{escape(line.name)} at {at:g}: {value:,.4g}</title>"
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" style="fill:var({line.colour})">{hint}</circle>')
    return "".join([*parts, "</svg>"])


def strip_plot(values: Sequence[float], marks: Sequence[tuple[str, float]], *, title: str, unit: str) -> str:
    """Every value as a dot on one axis from 0, and named marks as dashed lines."""
    height, ticks = 92, nice_ticks(max(values))

    def x_at(value: float) -> float:
        return 14 + value / ticks[-1] * (WIDTH - 34)

    parts = [f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">']
    for tick in ticks:
        x = x_at(tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="22" y2="66"/>')
        parts.append(f'<text x="{x:.1f}" y="82" text-anchor="middle">{tick:,g}</text>')
    for name, value in marks:
        x = x_at(value)
        parts.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="20" y2="66"/>')
        parts.append(f'<text x="{x:.1f}" y="13" text-anchor="middle">{escape(name)}</text>')
    for value in values:
        hint = f"<title>{value:,.4g} {escape(unit)}</title>"
        parts.append(f'<circle class="dot" cx="{x_at(value):.1f}" cy="44" r="5">{hint}</circle>')
    return "".join([*parts, "</svg>"])


def nice_ticks(largest: float) -> list[float]:
    """Four to six round numbers, from 0 to at least the largest value."""
    if largest <= 0:
        return [0.0, 1.0]
    power = 10.0 ** math.floor(math.log10(largest / 4))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if largest / (power * factor) <= 5)
    return [round(step * i, 12) for i in range(math.ceil(largest / step - 1e-9) + 1)]
