"""Gathers the facts of a run, in order: what can be reckoned, then loader, step and link, each alone; and judges them."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Iterator
from typing import Any

from fastjepa.checkpoint.format import latest
from fastjepa.config import Config
from fastjepa.data import steps_per_epoch
from fastjepa.data.sources.cache import cache_folder
from fastjepa.doctor import installation
from fastjepa.doctor.diagnosis import Report
from fastjepa.doctor.installation import GIB, Finding, Host
from fastjepa.doctor.limits import Link, Rate, Run, Verdict, amount, checkpoint_bytes, judge
from fastjepa.doctor.probes import Outcome, Settings, outcome_of, say
from fastjepa.doctor.suggest import Suggestion, applied, as_yaml, command, shares, suggest, what_to_do
from fastjepa.engine.ds_config import read_ds_config
from fastjepa.errors import CheckpointError, ConfigError
from fastjepa.objectives.ijepa.costs import Stage
from fastjepa.plan.planner import count, usable_memory
from fastjepa.run.folder import RunFolder
from fastjepa.train import DEFAULT_CONFIG
from fastjepa_kernels import no_wishes

_LOADER_SECONDS, _STEP_SECONDS = 1.2, 6.0  # of measuring: for each number of threads, for each micro batch
_LIBRARIES = 0.5 * GIB  # of a process, before it trains


def examine_run(
    config: Config, args: argparse.Namespace, host: Host, outcomes: dict[str, Outcome], found: list[Finding]
) -> Report:
    """
    Args:
        config: the run's, as `args` has it.
        args: of the command line: config, overrides, ds_config, ranks.
        outcomes: of the probes of the installation.
        found: of the installation, so far.

    Raises:
        ConfigError: the DeepSpeed JSON is wrong.
    """
    with no_wishes():  # FASTJEPA_KERNELS is judged by a probe, and must not end the formulas, which sample masks
        return _examine_run(config, args, host, outcomes, found)


def _examine_run(
    config: Config, args: argparse.Namespace, host: Host, outcomes: dict[str, Outcome], found: list[Finding]
) -> Report:
    settings: Settings = (args.config or str(DEFAULT_CONFIG), args.overrides)
    torch = outcomes["pytorch"].result
    run = _reckoned(config, args.ranks, host, torch)
    unshared = shares(run)
    run = applied(run, unshared)
    run = dataclasses.replace(run, stage=_stage(args.ds_config, run))
    say("training a small model on the kernels")
    kernels = outcome_of("kernels", {"settings": settings})
    found = [*found, *_installed(run, host, outcomes, kernels, needs_deepspeed=args.ds_config is not None)]

    kernels_work = bool(kernels.result) and not any("problem" in entry for entry in kernels.result["operations"])
    if not kernels_work:
        os.environ.pop("FASTJEPA_KERNELS", None)  # it is told: the loader, which samples masks, need not tell it again
    loader = _measure_loader(run, settings)
    dali_works = "problem" in outcomes["dali"].result and outcomes["dali"].result["problem"] is None
    run = dataclasses.replace(run, loader=_rates(loader), unused_decoder=dali_works and run.gpu)
    to_start = suggest(run)
    step = Outcome({})
    if kernels_work:
        changes = [*unshared, *to_start]
        real = bool(run.loader)
        step = _measure_step(applied(run, to_start), settings, changes, threads=torch["threads"], real=real)
    link = _measure_link(run)
    run = dataclasses.replace(
        run,
        step=_rates(step),
        estimated_step=step.result.get("reckoned_images_per_second"),
        link=Link(**link.result) if link.result else None,
    )
    suggestions = suggest(run)
    verdict = judge(run)
    todo = what_to_do(run, verdict, suggestions)
    all_suggestions = [*unshared, *suggestions]
    return Report(
        installation=found,
        run=[
            *_judge_batches(run, config, unshared),
            *_judge_memory(verdict, todo, run, step),
            *_judge_data(run, loader),
            *_judge_step(run, step, verdict),
            *_judge_link(run, link),
            *_judge_folders(config, loader.result.get("images", 0)),
        ],
        verdict=f"{verdict.sentence}; {todo}",
        duration=_duration(run, verdict, suggestions, loader.result.get("images", 0), step.result.get("together")),
        limit=verdict.limit,
        suggestions=all_suggestions,
        command=command(run, args.config, args.overrides, args.ds_config, all_suggestions),
        yaml=as_yaml(all_suggestions),
        facts={
            "host": dataclasses.asdict(host),
            "torch": torch,
            "kernels": kernels.result,
            "ranks": run.ranks,
            "stage": run.stage,
            "precision": "bf16" if run.bf16 else "fp32",
            "micro_batch_size": run.sizes.micro,
            "grad_accum_steps": run.sizes.accum,
            "memory_needed_bytes": run.memory_needed(),
            "memory_bytes": run.memory,
            "loader": loader.result,
            "step": step.result,
            "link": link.result,
            "images_per_second": verdict.images_per_second,
        },
    )


# Gathering


def _reckoned(config: Config, ranks: int | None, host: Host, torch: dict[str, Any]) -> Run:
    """What is known of the run before anything is measured."""
    gpus = torch["gpus"]
    ranks = ranks or max(1, len(gpus))
    fast = all(gpu["capability"] >= [8, 0] for gpu in gpus) if gpus else torch["cpu_bf16"]
    return Run(
        config=config,
        stage="torch",
        ranks=ranks,
        gpu=bool(gpus),
        bf16=config.precision == "bf16" or (config.precision == "auto" and bool(gpus) and fast),
        bf16_is_fast=fast,
        cores=max(1.0, host.cores / ranks),
        memory=usable_memory(min(gpu["free"] for gpu in gpus)) if gpus else host.memory / ranks - _LIBRARIES,
    )


def _stage(ds_config: str | None, run: Run) -> Stage:
    if ds_config is None:
        return "torch"
    settings = read_ds_config(ds_config, run.config, run.sizes, run.ranks, bf16=run.bf16)
    stage: Stage = settings["zero_optimization"]["stage"]
    return stage


def _measure_loader(run: Run, settings: Settings) -> Outcome:
    most = max(1, int(run.cores))
    halves = (most >> shift for shift in range(3))
    threads = sorted({run.config.data.num_threads, 1, *halves} - {0})
    say(f"measuring the loader with {', '.join(map(str, threads))} threads")
    arguments = {"settings": settings, "threads": threads, "micro": run.sizes.micro, "seconds": _LOADER_SECONDS}
    return outcome_of("loader", arguments)


def _measure_step(run: Run, settings: Settings, suggestions: list[Suggestion], *, threads: int, real: bool) -> Outcome:
    """At the micro batch; on a GPU at larger ones that fit, too. Nothing is measured where not even one image fits."""
    micro, share = run.sizes.micro, run.config.global_batch_size // run.ranks
    sizes = [micro, *(n for n in (2 * micro, 4 * micro) if run.gpu and share % n == 0)]
    sizes = [n for n in sizes if run.memory_needed(n) <= run.memory]
    if not sizes:
        return Outcome({})
    say(f"measuring the step with {' and '.join(map(str, sizes))} images")
    config, overrides = settings
    arguments = [s.argument for s in suggestions if not s.key.startswith("--")]
    if not run.gpu:  # the ranks share the cores
        threads = max(1, threads // run.ranks)
    given = {"settings": (config, [*overrides, *arguments]), "sizes": sizes, "threads": threads, "real": real}
    return outcome_of("step", {**given, "seconds": _STEP_SECONDS})


def _measure_link(run: Run) -> Outcome:
    if run.ranks == 1:
        return Outcome({})
    say(f"measuring how fast {run.ranks} ranks send")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(run.ranks))
    return outcome_of("link", {}, launcher)


def _rates(outcome: Outcome) -> dict[int, Rate]:
    rates: dict[str, dict[str, float]] = outcome.result.get("rates", {})
    return {int(key): Rate(rate["images_per_second"], rate["cpu_seconds"]) for key, rate in rates.items()}


# Judging


def _installed(
    run: Run, host: Host, outcomes: dict[str, Outcome], kernels: Outcome, *, needs_deepspeed: bool
) -> Iterator[Finding]:
    yield from installation.judge_deepspeed(outcomes["deepspeed"], needed=needs_deepspeed)
    yield from installation.judge_dali(outcomes["dali"], loader=run.config.data.loader, gpu=run.gpu)
    if "apex" in outcomes:
        yield from installation.judge_apex(outcomes["apex"])
    yield from installation.judge_kernels(kernels, gpu=run.gpu)
    yield from installation.judge_cpu(host, outcomes["pytorch"].result["threads"], run.ranks, gpu=run.gpu)
    yield from installation.judge_shm(host, run.ranks, gpu=run.gpu)


def _judge_batches(run: Run, config: Config, unshared: list[Suggestion]) -> Iterator[Finding]:
    for suggestion in unshared:
        yield Finding("batch sizes", "problem", suggestion.reason, f"such as {suggestion.argument}")
    sizes, stage = run.sizes, "plain PyTorch" if run.stage == "torch" else f"ZeRO {run.stage}"
    found = f"per step {count(run.ranks, 'rank')} x {sizes.accum} micro x {count(sizes.micro, 'image')}"
    found += f", {stage}, {'bf16' if run.bf16 else 'fp32'}"
    yield Finding("batches", "ok", f"{config.model.name}/{config.model.patch_size}, {found}")


def _judge_memory(verdict: Verdict, todo: str, run: Run, step: Outcome) -> Iterator[Finding]:
    if verdict.limit == "memory":
        yield Finding("memory", "problem", verdict.sentence.removeprefix("limited by memory: "), todo)
        return
    found = f"{run.memory_needed() / GIB:.1f} of {run.memory / GIB:.1f} GiB are needed, by formula"
    if rate := step.result.get("rates", {}).get(str(run.sizes.micro)):
        found += f"; measured {rate['peak_bytes'] / GIB:.1f} GiB" + ("" if run.gpu else ", libraries included")
    yield Finding("memory", "ok", found)


def _judge_data(run: Run, outcome: Outcome) -> Iterator[Finding]:
    if outcome.failure:
        advice = f"python -m fastjepa.data.check {run.config.data.source} names what cannot be read"
        yield Finding("data", "problem", f"reading the images {outcome.failure}", advice)
        return
    if outcome.result["problem"]:
        yield Finding("data", "problem", outcome.result["problem"])
    if not outcome.result["images"]:
        return
    images, held_out = outcome.result["images"], outcome.result["val_images"]
    found = f"{images:,} images" + (f", {held_out:,} held out" if held_out else "")
    try:
        found += f"; {count(steps_per_epoch(images, run.config.global_batch_size), 'step')} an epoch"
        yield Finding("data", "ok", found)
    except ConfigError as error:
        yield Finding(
            "data", "problem", str(error), f"such as global_batch_size={max(1, images // run.ranks) * run.ranks}"
        )
    if bad := outcome.result["bad"]:
        advice = f"python -m fastjepa.data.check {run.config.data.source} finds all of them before the run does"
        yield Finding("data", "warning", f"{count(len(bad), 'bad image')} among those read, such as: {bad[0]}", advice)
    rates = [
        f"{amount(rate.images_per_second)} with {count(threads, 'thread')}"
        for threads, rate in sorted(run.loader.items())
    ]
    if rates:
        mine = f"data.num_threads = {run.config.data.num_threads}"
        yield Finding("loader", "ok", f"images/s, alone: {', '.join(rates)} ({mine})")


def _judge_step(run: Run, outcome: Outcome, verdict: Verdict) -> Iterator[Finding]:
    if outcome.failure:
        yield Finding("step", "problem", f"training on noise {outcome.failure}", "the run may end in the same way")
    for micro, rate in outcome.result.get("rates", {}).items():
        engine = " by plain PyTorch" if run.stage != "torch" else ""
        found = f"{amount(rate['images_per_second'])} images/s, alone{engine}, with micro batches of {micro}"
        ceiling = f"the {outcome.result['ceiling_teraflops']:.3g} TFLOP/s that matrix products reach here"
        yield Finding("step", "ok", f"{found}: {rate['mfu']:.0%} of {ceiling}")
    if (micro := outcome.result.get("out_of_memory")) and micro <= run.sizes.micro:
        fewer = max((n for n in range(1, micro) if run.sizes.micro % n == 0), default=1)
        advice = f"expected to fit, by formula: micro_batch_size={fewer}, or model.activation_checkpointing=true"
        yield Finding("memory", "problem", f"a micro batch of {micro} images runs out of the GPU's memory", advice)
    if both := outcome.result.get("together"):
        found = f"{amount(both['images_per_second'])} images/s, {both['data_wait']:.0%} of the time waiting for images"
        alone = (verdict.images_per_second or 0.0) / run.ranks
        slow = both["images_per_second"] < 0.7 * alone
        advice = f"by what each does alone {amount(alone)}: they share the cores, with all else that runs here"
        yield Finding("step behind loader", "warning" if slow else "ok", found, advice if slow else "")
    if outcome.result and not outcome.result["rates"] and "out_of_memory" not in outcome.result:
        seconds = 1 / outcome.result["reckoned_images_per_second"]
        yield Finding(
            "step", "warning", f"too slow to be measured here: about {seconds:.0f} s an image, by its arithmetic"
        )


def _judge_link(run: Run, outcome: Outcome) -> Iterator[Finding]:
    if outcome.failure:
        advice = "expected as many GPUs as ranks, or none; communication is left out of the verdict"
        yield Finding(
            "communication", "warning", f"{run.ranks} ranks that send to one another: it {outcome.failure}", advice
        )
    elif run.link:
        plan = run.planned(run.stage)
        yield Finding(
            "communication",
            "ok",
            f"{run.link.bytes_per_second / 1e9:.2f} GB/s, {1e6 * run.link.latency:.0f} us, measured; by the formulas of "
            f"fastjepa.plan a step sends {plan.sent / 1e9:.3g} GB and waits {1e3 * plan.exposed_seconds:.0f} ms for it",
        )


def _duration(
    run: Run, verdict: Verdict, suggestions: list[Suggestion], images: int, together: dict[str, float] | None
) -> str | None:
    """Of the whole run with what was suggested, from what one rank's step and loader reached together, if measured."""
    after, batch = judge(applied(run, suggestions)).images_per_second, run.config.global_batch_size
    if not after or images < batch:
        return None
    if together and verdict.images_per_second:
        after *= run.ranks * together["images_per_second"] / verdict.images_per_second
    seconds = round(run.config.epochs * steps_per_epoch(images, batch)) * batch / after
    units = (("days", 86400), ("hours", 3600), ("minutes", 60), ("seconds", 1))
    unit, length = next((unit for unit in units if seconds >= 2 * unit[1]), units[-1])
    return f"{count(round(run.config.epochs), 'epoch')} of {images:,} images take about {seconds / length:.2g} {unit}"


def _judge_folders(config: Config, images: int) -> Iterator[Finding]:
    folder = RunFolder(config.output_dir)
    kept = config.keep_last + 1  # the newest is written before the oldest goes
    if config.keep_every and images >= config.global_batch_size:
        kept += int(config.epochs * steps_per_epoch(images, config.global_batch_size)) // config.keep_every
    held = sum(file.stat().st_size for file in folder.checkpoints.rglob("*") if file.is_file())
    yield from installation.judge_folders(folder.path, cache_folder(), checkpoint_bytes(config), kept, held)
    try:
        newest = latest(folder.checkpoints)
    except CheckpointError as error:
        yield Finding("checkpoint", "problem", str(error), "choose another output_dir, or repair the file")
        return
    if newest and config.resume == "never":
        advice = "choose another output_dir, or resume=auto"
        yield Finding("checkpoint", "problem", f"{folder.path} holds {newest.name}, and resume = never", advice)
    elif newest:
        yield Finding("checkpoint", "ok", f"the run goes on from {newest.name}")
