"""Renders a report into report.html: one HTML page that loads nothing from elsewhere."""

from __future__ import annotations

from dataclasses import asdict
from html import escape
from importlib.resources import files
from string import Template

import torch

from fastjepa.config.file import dump_config
from fastjepa.host import GIB, MIB
from fastjepa.profiling.plots import Line, Piece, bars, line_plot, stacked_bar, strip_plot
from fastjepa.profiling.report import KNEE, Report, memory_label, readable_flops
from fastjepa.profiling.steps import StepProfile
from fastjepa.profiling.time_split import IDLE, OTHER, TimeSplit

_COLOURS = {
    "backward": "--indigo", "graph replay": "--indigo", "optimizer": "--amber", "data wait": "--red",
    "waiting for weights": "--red", "waiting for gradients": "--red", "communication": "--plum",
    "loader": "--amber", "preparing": "--lime",
    "weights": "--blue", "averages": "--sky", "gradients": "--teal", "masters": "--lime", "moments": "--amber",
    "activations": "--indigo", "matmul": "--blue",
}  # fmt: skip
_MAX_OPERATORS = 24
_STAGE_COLOURS = ("--blue", "--sky", "--teal", "--lime")
"""Colours of the stages of an objective's forward pass, in their order."""


def _colour(name: str) -> str:
    return _COLOURS.get(name, "--grey")


def page(report: Report) -> str:
    """The text of report.html."""
    config, profile = report.config, report.profile
    height, width = config.data.image_hw
    sections = [
        _section("Where the time of a step goes", _time(profile.split)),
        '<div class="grid2">'
        + _section("Arithmetic", _arithmetic(profile))
        + _section("Steps", _steps(profile))
        + "</div>",
        *([_sweep(report)] if report.sweep else []),
        '<div class="grid2">'
        + _section("Memory", _memory(profile))
        + (_section("Real data against synthetic", _data(profile, report.synthetic)) if report.synthetic else "")
        + "</div>",
        _section("Kernels" if profile.on_gpu else "Operators", _operators(profile.split)),
    ]
    title = f"{config.model.name}/{config.model.patch_size} at {height} x {width}, {config.objective.name}"
    subtitle = (
        f"{profile.device}, {profile.precision}, PyTorch {torch.__version__}, {_count(profile.threads, 'CPU thread')}; "
        f"{_count(profile.ranks, 'rank')}, {_count(profile.grad_accum_steps, 'micro batch', 'es')} of "
        f"{profile.micro_batch_size} images"
    )
    template = Template((files("fastjepa.profiling") / "report.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=escape(title),
        subtitle=escape(subtitle),
        tiles=_tiles(profile),
        sections="\n".join(sections),
        command=escape(report.command),
        settings=escape(dump_config(config)),
    )


def _count(number: int, noun: str, plural: str = "s") -> str:
    return f"{number:,} {noun}{plural * (number != 1)}"


def _section(heading: str, body: str) -> str:
    return f"<section><h2>{escape(heading)}</h2>{body}</section>"


def _note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def _tiles(p: StepProfile) -> str:
    tiles = [
        (f"{p.images_per_second:,.4g}" if p.images_per_second < 1000 else f"{p.images_per_second:,.0f}", "images/s"),
        (f"{p.tokens_per_second:,.0f}", "tokens/s"),
        (_ms(p.step_ms.p50), f"per step, median; p20 {_ms(p.step_ms.p20)}, p80 {_ms(p.step_ms.p80)}"),
        (f"{p.mfu:.1%}", "MFU: share of the FLOP/s of a matrix product measured here"),
        *([(f"{p.datasheet_mfu:.1%}", "MFU: share of the datasheet's FLOP/s")] if p.datasheet_mfu is not None else []),
        (f"{p.split.matmul_share:.0%}", "of a step's time is in matrix products and attention"),
        (f"{p.data_wait:.1%}", "of a step's time is spent waiting for data"),
    ]
    return "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(what)}</span></div>' for value, what in tiles
    )


def _ms(ms: float) -> str:
    return f"{ms / 1e3:,.2f} s" if ms >= 1e4 else f"{ms:,.0f} ms" if ms >= 100 else f"{ms:,.3g} ms"


def _time(split: TimeSplit) -> str:
    stages = [part.name for part in split.parts if part.name not in _COLOURS and part.name not in (IDLE, OTHER)]
    colours = {name: _STAGE_COLOURS[number % len(_STAGE_COLOURS)] for number, name in enumerate(stages)}
    pieces = [
        Piece(part.name, part.ms, f"{part.share:.1%}", colours.get(part.name) or _colour(part.name))
        for part in split.parts
    ]
    body = stacked_bar(pieces, "shares of a step's time")
    if split.beside:
        beside = ", ".join(f"{part.name} {part.share:.0%}" for part in split.beside)
        body += _note(f"Running beside the step on other threads and streams, as shares of the step's time: {beside}.")
    return body + _note(
        f"Measured under the profiler, which slows down step and loader: these steps took {_ms(split.step_ms)} each. "
        "The figures at the top are of steps without the profiler."
    )


def _arithmetic(p: StepProfile) -> str:
    rows = [
        Piece("reached by the step", p.teraflops, readable_flops(p.teraflops), "--blue"),
        Piece(
            "a large matrix product, measured here",
            p.ceilings.teraflops,
            readable_flops(p.ceilings.teraflops),
            "--grey",
        ),
    ]
    if p.datasheet_teraflops is not None:
        rows.append(Piece("datasheet", p.datasheet_teraflops, readable_flops(p.datasheet_teraflops), "--grey"))
    tokens = ", ".join(f"{number:,.1f} {name}" for name, number in p.tokens.items() if "_" not in name)
    return bars(rows, max(row.value for row in rows)) + _note(
        f"A step computes {readable_flops(p.teraflop_per_step, '')}, by formula from the length of every sequence. "
        f"Mean number of tokens per image: {tokens}."
    )


def _steps(p: StepProfile) -> str:
    return strip_plot(p.steps_ms, [("p50", p.step_ms.p50)], title="times of the steps", unit="ms") + _note(
        f"Milliseconds of {len(p.steps_ms)} steps, one dot each, from the end of one step to the end of the next."
    )


def _sweep(report: Report) -> str:
    sweep, knee = report.sweep, report.knee
    assert knee is not None
    xs = [point.micro_batch_size for point in sweep]
    speed = Line("images/s", [point.images_per_second for point in sweep], "--blue")
    used = [point.memory for point in sweep]
    memory = [
        Line("state and activations", [(m.state + m.activations) / MIB for m in used], "--indigo"),
        Line("state", [m.state / MIB for m in used], "--amber"),
    ]
    names = "".join(
        f'<li><i style="background:var({line.colour})"></i><span>{escape(line.name)}</span></li>' for line in memory
    )
    at = float(knee.micro_batch_size)
    body = (
        '<div class="grid2"><div><h3>images/s</h3>'
        + line_plot(xs, [speed], title="images/s against micro batch", x_label="images in a micro batch", marked=at)
        + "</div><div><h3>memory, MiB</h3>"
        + line_plot(xs, memory, title="memory against micro batch", x_label="images in a micro batch", marked=at)
        + f'<ul class="legend">{names}</ul></div></div>'
    )
    return _section(
        f"Micro batch: the knee is at {knee.micro_batch_size}",
        body
        + _note(
            f"Measured with synthetic images. The knee is the smallest micro batch within {1 - KNEE:.0%} of the best speed. "
            f"{report.sweep_end}"
        ),
    )


def _memory(p: StepProfile) -> str:
    pieces = [
        Piece(memory_label(name), size, _mib(size), _colour(name))
        for name, size in asdict(p.memory).items()
        if size and name != "other"
    ]
    rest = "batches and buffers" if p.on_gpu else "the interpreter, libraries and batches"
    return stacked_bar(pieces, "memory by purpose") + _note(
        f"Peak: {_mib(p.memory.peak)}. Not shown: {_mib(p.memory.other)} for {rest}."
    )


def _mib(size: float) -> str:
    return f"{size / GIB:,.2f} GiB" if size >= GIB else f"{size / MIB:,.1f} MiB"


def _data(real: StepProfile, synthetic: StepProfile) -> str:
    rows = [
        Piece(
            f"{name}, data wait {p.data_wait:.1%}", p.images_per_second, f"{p.images_per_second:,.4g} images/s", colour
        )
        for name, p, colour in (("real", real, "--blue"), ("synthetic", synthetic, "--grey"))
    ]
    share = real.images_per_second / synthetic.images_per_second
    return bars(rows, max(row.value for row in rows)) + _note(
        f"With the images of data.source, training reaches {share:.0%} of its speed with synthetic images, which need no "
        "loading."
    )


def _operators(split: TimeSplit) -> str:
    largest = max((row.share for row in split.operators), default=1.0)
    rows = "".join(
        f'<tr><td><i style="background:var({_colour(row.kind)})"></i>{escape(row.name)}</td>'
        f'<td class="wide">{row.calls:,.{0 if row.calls >= 10 else 1}f}</td><td>{row.ms:,.2f}</td><td>{row.share:.1%}</td>'
        f'<td class="wide"><span class="track"><div style="width:{100 * row.share / largest:.1f}%;'
        f'background:var({_colour(row.kind)})"></div></span></td></tr>'
        for row in split.operators[:_MAX_OPERATORS]
    )
    rest = split.operators[_MAX_OPERATORS:]
    left = f" Another {len(rest)} take {sum(row.share for row in rest):.1%}; operators.csv lists all." if rest else ""
    return (
        '<div class="scroll"><table><thead><tr><th>name</th><th class="wide">calls</th><th>ms</th><th>share</th>'
        f'<th class="wide"></th></tr></thead><tbody>{rows}</tbody></table></div>'
        + _note(
            f"Calls and milliseconds per step under the profiler, each without the operators that it calls. "
            f"Blue: matrix products and attention.{left}"
        )
    )
