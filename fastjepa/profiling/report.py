"""The measurements of a profile, as figures for CSV and as a table for a terminal."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from fastjepa.config import Config
from fastjepa.host import MIB
from fastjepa.profiling.steps import StepProfile
from fastjepa.profiling.timing import NOISE

KNEE = 1 - NOISE
"""Share of the best images/s at which a larger micro batch is no longer worth its memory."""


@dataclass(frozen=True)
class Report:
    """The profile of a run and, if they were measured, profiles with synthetic images to compare it with."""

    command: str
    """The command line that made the report."""
    config: Config
    profile: StepProfile
    """The run with the images that its configuration names."""
    synthetic: StepProfile | None = None
    """The same with synthetic images, which need no loading."""
    sweep: tuple[StepProfile, ...] = ()
    """Profiles with synthetic images and micro batches of increasing size."""
    sweep_end: str = ""
    """Why the sweep ended: a sentence for the reader."""

    @property
    def knee(self) -> StepProfile | None:
        """The smallest micro batch of the sweep that is about as fast as any (KNEE)."""
        best = max((p.images_per_second for p in self.sweep), default=0.0)
        return next((p for p in self.sweep if p.images_per_second >= KNEE * best), None)

    def measurements(self) -> list[tuple[str, StepProfile]]:
        """All profiles, each with what it is of: run, synthetic or sweep."""
        synthetic = [("synthetic", self.synthetic)] if self.synthetic else []
        return [("run", self.profile), *synthetic, *(("sweep", point) for point in self.sweep)]


_MEMORY_LABELS = {"averages": "EMA weights", "masters": "fp32 master weights", "moments": "AdamW moments"}


def memory_label(field: str) -> str:
    """A field of `Memory` in words for a reader."""
    return _MEMORY_LABELS.get(field, field)


def figures(profile: StepProfile) -> dict[str, Any]:
    """The figures of a profile that fit into one row of a table."""
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
    """The profile as text for a terminal."""
    p, memory = profile, profile.memory
    against = f"MFU {p.mfu:.1%} of the {readable_flops(p.ceilings.teraflops)} of a matrix product measured here"
    if p.datasheet_mfu is not None:
        against += f", {p.datasheet_mfu:.1%} of the {p.datasheet_teraflops:.0f} TFLOP/s of the datasheet"
    lines = [
        f"{p.device}, {p.precision}, {p.threads} threads, ranks x micro batches x images: "
        f"{p.ranks} x {p.grad_accum_steps} x {p.micro_batch_size}",
        f"step {p.step_ms.p50:,.1f} ms (p20 {p.step_ms.p20:,.1f}, p80 {p.step_ms.p80:,.1f})   {p.images_per_second:,.1f} "
        f"images/s   {p.tokens_per_second:,.0f} tokens/s   data wait {p.data_wait:.1%}",
        f"{readable_flops(p.teraflop_per_step, '')} per step, {readable_flops(p.teraflops)}: {against}",
        "",
        f"shares of a step's time, under the profiler; {p.split.matmul_share:.0%} in matrix products and attention",
        *(f"  {part.name:<24}{part.share:>7.1%}" for part in p.split.parts),
    ]
    if p.split.beside:
        lines.append("running beside the step")
        lines += [f"  {part.name:<24}{part.share:>7.1%}" for part in p.split.beside]
    lines += ["", f"memory: {memory.peak / MIB:,.0f} MiB at the peak"]
    lines += [f"  {memory_label(name):<24}{size / MIB:>10,.1f} MiB" for name, size in asdict(memory).items()]
    lines += ["", f"{'operators, per step':<60}{'calls':>8}{'ms':>10}{'share':>8}"]
    for row in p.split.operators[:operators]:
        lines.append(f"  {row.name[:56]:<58}{row.calls:>8,.0f}{row.ms:>10,.2f}{row.share:>8.1%}")
    return "\n".join(lines)


def readable_flops(tera: float, per: str = "/s") -> str:
    """A number of 10^12 FLOPs as text."""
    return f"{tera:,.3g} TFLOP{per}" if tera >= 1 else f"{1e3 * tera:,.3g} GFLOP{per}"
