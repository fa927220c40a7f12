"""What a profile leaves behind: a table, JSON, CSV, and a page that needs nothing else."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fastjepa.config import Config
from fastjepa.profiling.page import page, readable_flops
from fastjepa.profiling.steps import StepProfile
from fastjepa.run.folder import explain_write_errors

KNEE = 0.95
"""Share of the best rate at which a larger micro batch is no longer worth its memory."""


@dataclass(frozen=True)
class Report:
    command: str
    config: Config
    profile: StepProfile
    """With the images that the configuration names."""
    synthetic: StepProfile | None = None
    """With images that cost nothing to get."""
    sweep: tuple[StepProfile, ...] = ()
    """Synthetic images, micro batches of rising size."""
    sweep_end: str = ""
    """Why it has no more."""

    @property
    def knee(self) -> StepProfile | None:
        """Of the sweep: the smallest micro batch that is about as fast as any."""
        best = max((p.images_per_second for p in self.sweep), default=0.0)
        return next((p for p in self.sweep if p.images_per_second >= KNEE * best), None)

    def measurements(self) -> list[tuple[str, StepProfile]]:
        synthetic = [("synthetic", self.synthetic)] if self.synthetic else []
        return [("run", self.profile), *synthetic, *(("sweep", point) for point in self.sweep)]

    def write(self, folder: Path) -> None:
        """report.json, report.csv, operators.csv and report.html.

        Raises:
            RunFolderError: they cannot be written.
        """
        measured = self.measurements()
        knee = self.knee
        content = {
            "command": self.command,
            "torch": torch.__version__,
            "config": asdict(self.config),
            "knee": knee.micro_batch_size if knee else None,
            "measurements": [{"of": of} | profile.as_dict(operators=of == "run") for of, profile in measured],
        }
        with explain_write_errors(str(folder), "Choose another folder"):
            (folder / "report.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            _write_csv(folder / "report.csv", [{"of": of} | figures(profile) for of, profile in measured])
            _write_csv(folder / "operators.csv", [asdict(row) for row in self.profile.split.operators])
            (folder / "report.html").write_text(page(self), encoding="utf-8")


def _write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def figures(profile: StepProfile) -> dict[str, Any]:
    """What of a profile fits into a line of a table."""
    p, memory = profile, profile.memory
    return {
        "device": p.device,
        "precision": p.precision,
        "threads": p.threads,
        "ranks": p.ranks,
        "micro_batch_size": p.micro_batch_size,
        "grad_accum_steps": p.grad_accum_steps,
        "step_ms_p20": p.step_ms.p20,
        "step_ms_p50": p.step_ms.p50,
        "step_ms_p80": p.step_ms.p80,
        "images_per_second": p.images_per_second,
        "tokens_per_second": p.tokens_per_second,
        "teraflop_per_step": p.teraflop_per_step,
        "teraflops": p.teraflops,
        "ceiling_teraflops": p.ceilings.teraflops,
        "mfu": p.mfu,
        "datasheet_mfu": p.datasheet_mfu,
        "matmul_share": p.split.matmul_share,
        "data_wait": p.data_wait,
        "state_bytes": memory.state,
        "activation_bytes": memory.activations,
        "peak_bytes": memory.peak,
    }


def format_profile(profile: StepProfile, *, operators: int = 8) -> str:
    """For a terminal."""
    p, memory = profile, profile.memory
    against = f"MFU {p.mfu:.1%} of {readable_flops(p.ceilings.teraflops)} measured"
    if p.datasheet_mfu is not None:
        against += f", {p.datasheet_mfu:.1%} of {p.datasheet_teraflops:.0f} TFLOP/s by the datasheet"
    lines = [
        f"{p.device}, {p.precision}, {p.threads} threads, {p.ranks} x {p.grad_accum_steps} x {p.micro_batch_size} images",
        f"step {p.step_ms.p50:,.1f} ms (p20 {p.step_ms.p20:,.1f}, p80 {p.step_ms.p80:,.1f})   {p.images_per_second:,.1f} "
        f"images/s   {p.tokens_per_second:,.0f} tokens/s   data wait {p.data_wait:.1%}",
        f"{readable_flops(p.teraflop_per_step, '')} a step, {readable_flops(p.teraflops)}: {against}",
        "",
        f"time of a step, under the profiler; {p.split.matmul_share:.0%} in matrix products and attention",
        *(f"  {part.name:<24}{part.share:>7.1%}" for part in p.split.parts),
    ]
    if p.split.beside:
        lines.append("beside the step")
        lines += [f"  {part.name:<24}{part.share:>7.1%}" for part in p.split.beside]
    lines += ["", f"memory: {memory.peak / 2**20:,.0f} MiB"]
    lines += [f"  {name.replace('_', ' '):<24}{size / 2**20:>10,.1f} MiB" for name, size in asdict(memory).items()]
    lines += ["", f"{'operators':<60}{'calls':>8}{'ms':>10}{'share':>8}"]
    for row in p.split.operators[:operators]:
        lines.append(f"  {row.name[:56]:<58}{row.calls:>8,.0f}{row.ms:>10,.2f}{row.share:>8.1%}")
    return "\n".join(lines)
