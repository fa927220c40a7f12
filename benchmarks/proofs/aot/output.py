"""The report as files: aot.json with everything, aot.md to read, aot.png as an overview."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.proofs.aot.cases import BATCH_SIZE, Case
from benchmarks.proofs.aot.roofline import PEAKS, bound
from benchmarks.proofs.aot.variants import TARGETS, Report, Variant

_LEGEND = f"""# The Triton kernels, compiled and checked without a GPU

Made by `python -m benchmarks.proofs.aot` with triton {version("triton")}: every kernel, configuration and
specialisation that training launches, compiled for each target. No time below was measured.

**Bounds**: the bytes that must cross the memory bus and the floating-point operations of matrix products for
{BATCH_SIZE} images, and the time that an A100 or H100 (SXM) needs for them at its data sheet's rates. No kernel can
be faster. Products of fp32 are exact, so they do not use tensor cores.

**Compiled**: for each target, the registers of a thread, the blocks that one multiprocessor holds at a time (and what
limits them: r registers, s shared memory, w warps, b blocks, t tensor memory), shared memory if any, and spilled
bytes if any. *mma* is the number of tensor core instructions and *wide* the share of global accesses that move 16
bytes per thread, both in the code of {{target}}, where an instruction in a loop counts once.
"""


def as_json(report: Report) -> dict[str, Any]:
    return {
        "versions": {name: version(name) for name in ("triton", "torch")},
        "batch_size": BATCH_SIZE,
        "cases": [
            {
                "op": case.op,
                "name": case.name,
                "dtype": str(case.dtype).removeprefix("torch."),
                "pass": name,
                **asdict(work),
                "bounds": {gpu: asdict(bound(work, case.dtype, gpu)) for gpu in PEAKS},
            }
            for case in report.cases
            for name, work in case.passes()
        ],
        "kernels": [
            asdict(variant) | {"cases": sorted(variant.cases), "broken_limits": variant.broken()}
            for variant in sorted(report.variants, key=lambda variant: variant.name)
        ],
        "failures": [asdict(failure) for failure in report.failures],
    }


def as_markdown(report: Report) -> str:
    targets = [target for target in TARGETS if any(v.compiled.target == target for v in report.variants)]
    code = "sm_90" if "sm_90" in targets else targets[0]
    parts = [_LEGEND.format(target=code)]
    for op in dict.fromkeys(case.op for case in report.cases):
        parts.append(f"## {op}\n")
        parts.append("\n".join(_bounds_table(case for case in report.cases if case.op == op)) + "\n")
        variants = [variant for variant in report.variants if variant.op == op]
        for kernel in sorted({variant.compiled.kernel for variant in variants}):
            table = _kernel_table([v for v in variants if v.compiled.kernel == kernel], targets, code)
            parts.append(f"### {kernel}\n\n" + "\n".join(table) + "\n")
    if report.failures:
        parts.append("## Kernels that do not compile\n")
        parts.append("\n".join(f"- {x.case} for {x.target}: {x.error}" for x in report.failures) + "\n")
    broken = report.broken()
    parts.append("## Limits\n")
    parts.append("\n".join(f"- {line}" for line in broken) + "\n" if broken else "All are kept.\n")
    return "\n".join(parts)


def _bounds_table(cases: Iterable[Case]) -> Iterator[str]:
    yield "| case | pass | MB | GFLOP | A100 µs | H100 µs | limited by |"
    yield "|---|---|---:|---:|---:|---:|---|"
    for case in cases:
        dtype = str(case.dtype).removeprefix("torch.")
        for name, work in case.passes():
            a100, h100 = (bound(work, case.dtype, gpu) for gpu in ("A100", "H100"))
            limiter = h100.limiter if a100.limiter == h100.limiter else f"{a100.limiter}, {h100.limiter}"
            yield (
                f"| {case.name} ({dtype}) | {name} | {work.bytes / 1e6:.1f} | {work.flops / 1e9:.1f} "
                f"| {a100.microseconds:.1f} | {h100.microseconds:.1f} | {limiter} |"
            )


def _kernel_table(variants: list[Variant], targets: list[str], code: str) -> Iterator[str]:
    yield f"| specialisation | configuration | {' | '.join(targets)} | mma | wide | compile s |"
    yield f"|---|---|{'---|' * len(targets)}---|---:|---:|"
    rows: dict[tuple[str, str], dict[str, Variant]] = {}
    for variant in variants:
        rows.setdefault((variant.specialisation, variant.config), {})[variant.compiled.target] = variant
    for (specialisation, config), by_target in sorted(rows.items()):
        cells = [_cell(by_target[target]) if target in by_target else "-" for target in targets]
        shown = by_target.get(code, next(iter(by_target.values()))).compiled
        mma = f"{shown.mma} {shown.mma_family}" if shown.mma else "-"
        yield (
            f"| {specialisation} | {config} | {' | '.join(cells)} | {mma} | {shown.wide_fraction:.2f} "
            f"| {shown.compile_seconds:.1f} |"
        )


def _cell(variant: Variant) -> str:
    compiled = variant.compiled
    if not compiled.fits:
        return f"**does not fit** ({compiled.shared_bytes / 1024:.0f} KB)"
    limiters = "".join(word[0] for word in compiled.limited_by.split(", "))
    text = f"{compiled.registers} r, {compiled.blocks_per_sm}/SM ({limiters})"
    text += f", {compiled.shared_bytes / 1024:.0f} KB" if compiled.shared_bytes >= 1024 else ""
    return text + (f", **spills {compiled.spill_bytes} B**" if compiled.spill_bytes else "")


def _one_entry_a_line(values: dict[str, Any]) -> str:
    """JSON with one line per kernel, so that a changed kernel is a changed line."""
    lists = {key: ",\n".join(map(json.dumps, value)) for key, value in values.items() if isinstance(value, list)}
    parts = [f"{json.dumps(k)}: " + (f"[\n{lists[k]}\n]" if k in lists else json.dumps(v)) for k, v in values.items()]
    return "{\n" + ",\n".join(parts) + "\n}\n"


def write(report: Report, folder: Path) -> None:
    from benchmarks.proofs.aot.plot import plot

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "aot.json").write_text(_one_entry_a_line(as_json(report)))
    (folder / "aot.md").write_text(as_markdown(report))
    plot(report, folder / "aot.png")
