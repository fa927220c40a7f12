"""Findings about the run: its batches, memory, data, loader, step, communication and folders, and how long it will take."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from fastjepa.checkpoint.format import latest
from fastjepa.checkpoint.writer import SPACE_MARGIN
from fastjepa.config import Config
from fastjepa.data import steps_per_epoch
from fastjepa.data.sources.cache import cache_folder
from fastjepa.doctor.diagnosis import Finding
from fastjepa.doctor.limits import Run, Verdict, checkpoint_bytes, find_limit, format_bytes, format_rate
from fastjepa.doctor.probe_process import Outcome
from fastjepa.doctor.suggest import Suggestion, applied
from fastjepa.errors import CheckpointError, ConfigError
from fastjepa.plan.planner import count
from fastjepa.run.folder import RunFolder


def judge_batches(run: Run, batch_changes: list[Suggestion]) -> Iterator[Finding]:
    """
    Args:
        run: the run with the changes, without which it could not start.
        batch_changes: batch sizes that had to be changed so that ranks and micro batches divide them.
    """
    for change in batch_changes:
        yield Finding("batch sizes", "problem", change.reason, f"use, for example, {change.argument}")
    sizes, stage = run.sizes, "plain PyTorch" if run.stage == "torch" else f"ZeRO {run.stage}"
    micro_batches = f"{sizes.accum} micro batch{'es' * (sizes.accum != 1)}"
    batches = f"{count(run.ranks, 'rank')} x {micro_batches} x {count(sizes.micro, 'image')} per step"
    precision = "bf16" if run.bf16 else "fp32"
    model = run.config.model
    yield Finding("batches", "ok", f"{model.name}/{model.patch_size} trains {batches}, with {stage} in {precision}")


def judge_memory(verdict: Verdict, advice: str, run: Run, step: Outcome) -> Iterator[Finding]:
    if verdict.limit == "memory":
        yield Finding("memory", "problem", verdict.sentence.removeprefix("limited by memory: "), advice)
        return
    found = f"{format_bytes(run.memory_needed())} needed by formula, {format_bytes(run.memory)} available"
    if rate := step.result.get("rates", {}).get(str(run.sizes.micro)):
        found += f"; {format_bytes(rate['peak_bytes'])} measured" + ("" if run.gpu else ", libraries included")
    yield Finding("memory", "ok", found)


def judge_data(run: Run, loader: Outcome) -> Iterator[Finding]:
    check = f"python -m fastjepa.data.check {run.config.data.source}"
    if loader.failure:
        yield Finding(
            "data", "problem", f"reading the images {loader.failure}", f"{check} names the images that cannot be read"
        )
        return
    if loader.result["problem"]:
        yield Finding("data", "problem", loader.result["problem"])
    if not loader.result["images"]:
        return
    images, held_out = loader.result["images"], loader.result["val_images"]
    found = f"{images:,} images" + (f", {held_out:,} held out" if held_out else "")
    try:
        found += f"; {count(steps_per_epoch(images, run.config.global_batch_size), 'step')} per epoch"
        yield Finding("data", "ok", found)
    except ConfigError as error:
        fitting = max(1, images // run.ranks) * run.ranks
        yield Finding("data", "problem", str(error), f"use, for example, global_batch_size={fitting}")
    if bad := loader.result["bad"]:
        found = f"{count(len(bad), 'bad image')} among those that were read; the first: {bad[0]}"
        yield Finding("data", "warning", found, f"{check} finds all of them before the run does")
    if run.loader:
        rates = [
            f"{format_rate(rate.images_per_second)} images/s with {count(threads, 'thread')}"
            for threads, rate in sorted(run.loader.items())
        ]
        mine = f"this run: data.num_threads = {run.config.data.num_threads}"
        yield Finding("loader", "ok", f"{', '.join(rates)}, {_measured_alone(run)} ({mine})")


def judge_step(run: Run, step: Outcome, verdict: Verdict) -> Iterator[Finding]:
    if step.failure:
        yield Finding(
            "step", "problem", f"training on synthetic images {step.failure}", "the run may end in the same way"
        )
    for micro, rate in step.result.get("rates", {}).items():
        engine = " in plain PyTorch" if run.stage != "torch" else ""
        speed = f"{format_rate(rate['images_per_second'])} images/s with micro batches of {micro}"
        found = f"{speed}, {_measured_alone(run)}{engine}"
        ceiling = f"{step.result['ceiling_teraflops']:.3g} TFLOP/s that matrix products reach here"
        yield Finding("step", "ok", f"{found}: {rate['mfu']:.0%} of the {ceiling}")
    if (micro := step.result.get("out_of_memory")) and micro <= run.sizes.micro:
        fewer = max((n for n in range(1, micro) if run.sizes.micro % n == 0), default=1)
        found = f"a micro batch of {micro} images runs out of the GPU's memory, although it should fit by formula"
        advice = f"use micro_batch_size={fewer}, or model.activation_checkpointing=true"
        yield Finding("memory", "problem", found, advice)
    if both := step.result.get("with_loader"):
        on_one_rank = " on one rank" if run.ranks > 1 else ""
        found = f"{format_rate(both['images_per_second'])} images/s together{on_one_rank}"
        found += f"; {both['data_wait']:.0%} of the time the step waits for images"
        expected = (verdict.images_per_second or 0.0) / run.ranks
        slow = both["images_per_second"] < 0.7 * expected
        advice = (
            f"expected about {format_rate(expected)} from what each reaches alone: they share the cores with each other"
        )
        advice += " and with all else that runs here"
        yield Finding("loader and step", "warning" if slow else "ok", found, advice if slow else "")
    if step.result and not step.result["rates"] and "out_of_memory" not in step.result:
        seconds = 1 / step.result["estimated_images_per_second"]
        found = f"too slow to be measured here: about {seconds:.0f} s per image, estimated from its FLOPs"
        yield Finding("step", "warning", found, "train on a GPU, or use a smaller model")


def _measured_alone(run: Run) -> str:
    return "measured alone" if run.ranks == 1 else "measured on one rank alone"


def judge_link(run: Run, link: Outcome) -> Iterator[Finding]:
    if link.failure:
        found = f"the test of {run.ranks} ranks that send to one another {link.failure}"
        advice = "expected as many GPUs as ranks, or none; the verdict leaves communication out"
        yield Finding("communication", "warning", found, advice)
    elif run.link:
        plan = run.plan_at(run.stage)
        measured = f"{run.link.bytes_per_second / 1e9:.2f} GB/s, latency {1e6 * run.link.latency:.0f} us, measured"
        step = f"sends {format_bytes(plan.sent)} per rank and waits {1e3 * plan.exposed_seconds:.0f} ms for it"
        yield Finding("communication", "ok", f"{measured}; by the formulas of fastjepa.plan a step {step}")


def judge_run_folder(config: Config, images: int) -> Iterator[Finding]:
    """Judge the disk of output_dir and the checkpoints that lie there, and the cache of image lists."""
    folder = RunFolder(config.output_dir)
    kept = config.keep_last + 1  # the newest is written before the oldest is deleted
    if config.keep_every and images >= config.global_batch_size:
        kept += int(config.epochs * steps_per_epoch(images, config.global_batch_size)) // config.keep_every
    held = sum(file.stat().st_size for file in folder.checkpoints.rglob("*") if file.is_file())
    yield from judge_disks(folder.path, cache_folder(), checkpoint_bytes(config), kept, held)
    try:
        newest = latest(folder.checkpoints)
    except CheckpointError as error:
        yield Finding("checkpoint", "problem", str(error), "choose another output_dir, or repair the file")
        return
    if newest and config.resume == "never":
        advice = "choose another output_dir, or resume=auto"
        yield Finding("checkpoint", "problem", f"{folder.path} holds {newest.name}, and resume = never", advice)
    elif newest:
        yield Finding("checkpoint", "ok", f"the run continues from {newest.name}")


def judge_disks(
    output_dir: Path, cache: Path, checkpoint: int, kept: int, held: int, *, free: int | None = None
) -> Iterator[Finding]:
    """
    Args:
        cache: the folder of image lists.
        checkpoint: bytes of one checkpoint.
        kept: the largest number of checkpoints that lie there at a time.
        held: bytes of the checkpoints that lie there already.
        free: free bytes on the disk of output_dir; None: look.
    """
    existing = _nearest_existing(output_dir)
    free = shutil.disk_usage(existing).free if free is None else free
    found = (
        f"{output_dir}: {format_bytes(free)} free, for up to {count(kept, 'checkpoint')} of {format_bytes(checkpoint)}"
    )
    needed = SPACE_MARGIN * kept * checkpoint - held
    if not _writable(existing):
        advice = "expected a folder that you may write to: choose another output_dir"
        yield Finding("output_dir", "problem", f"{existing} cannot be written to", advice)
    elif free < SPACE_MARGIN * checkpoint:
        least = format_bytes(SPACE_MARGIN * checkpoint)
        advice = f"not even one fits: free {least}, or choose an output_dir on a larger disk"
        yield Finding("output_dir", "problem", found, advice)
    elif free < needed:
        advice = f"{format_bytes(needed)} are needed: lower keep_last, or choose an output_dir on a larger disk"
        yield Finding("output_dir", "warning", found, advice)
    else:
        yield Finding("output_dir", "ok", found)
    existing = _nearest_existing(cache)
    if _writable(existing):
        yield Finding("cache folder", "ok", f"{cache}: {format_bytes(shutil.disk_usage(existing).free)} free")
    else:
        advice = "every run has to list its images anew: export FASTJEPA_CACHE=FOLDER, one that you may write to"
        yield Finding("cache folder", "warning", f"{existing} cannot be written to", advice)


def estimate_duration(
    run: Run, verdict: Verdict, suggestions: list[Suggestion], images: int, with_loader: dict[str, float] | None
) -> str | None:
    """How long the whole run takes with the suggestions, in a sentence; None: unknown.

    Args:
        verdict: that of the run without the suggestions.
        images: images of the data set.
        with_loader: what loader and step of one rank reached together, if it was measured: it corrects the estimate.
    """
    rate, batch = find_limit(applied(run, suggestions)).images_per_second, run.config.global_batch_size
    if not rate or images < batch:
        return None
    if with_loader and verdict.images_per_second:
        rate *= run.ranks * with_loader["images_per_second"] / verdict.images_per_second
    epochs = run.config.epochs
    seconds = round(epochs * steps_per_epoch(images, batch)) * batch / rate
    units = (("days", 86400), ("hours", 3600), ("minutes", 60), ("seconds", 1))
    unit, length = next((unit for unit in units if seconds >= 2 * unit[1]), units[-1])
    return f"{epochs:,.4g} epoch{'s' * (epochs != 1)} of {images:,} images take about {seconds / length:.2g} {unit}"


def _nearest_existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    path = path.expanduser().absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())


def _writable(folder: Path) -> bool:
    return os.access(folder, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids)
