"""Examines a run, in order: what formulas say, then measurements of loader, step and link, each alone; then the verdict."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Iterator
from typing import Any

from fastjepa.config import Config
from fastjepa.config.command_line import config_file
from fastjepa.doctor import judge_installation, judge_run
from fastjepa.doctor.diagnosis import Finding, Report
from fastjepa.doctor.host_facts import HostFacts
from fastjepa.doctor.limits import Link, Rate, Run, find_limit
from fastjepa.doctor.probe_installation import Settings
from fastjepa.doctor.probe_process import Outcome, print_progress, run_probe
from fastjepa.doctor.suggest import (
    Suggestion,
    applied,
    as_yaml,
    fix_batch_sizes,
    start_command,
    suggest,
    what_to_do,
)
from fastjepa.engine.ds_config import read_ds_config
from fastjepa.host import GIB
from fastjepa.plan.planner import usable_memory
from fastjepa.plan.zero import Stage
from fastjepa_kernels import without_requests

_LOADER_SECONDS, _STEP_SECONDS = 1.2, 6.0  # how long to measure each number of threads, and each micro batch
_LIBRARIES = 0.5 * GIB  # host memory of a process before it trains


def examine_run(
    config: Config, args: argparse.Namespace, host: HostFacts, outcomes: dict[str, Outcome], found: list[Finding]
) -> Report:
    """Measure the run, judge it, and suggest settings.

    Args:
        config: the configuration that `args` describe.
        args: arguments of the command line: config, overrides, ds_config, ranks.
        outcomes: those of the probes of the installation, without the kernels'.
        found: findings about the installation so far.

    Raises:
        ConfigError: the DeepSpeed JSON is wrong.
    """
    # The formulas sample masks, and a wrong FASTJEPA_KERNELS would end them. The probe of the kernels reports it.
    with without_requests():
        return _examine_run(config, args, host, outcomes, found)


def _examine_run(
    config: Config, args: argparse.Namespace, host: HostFacts, outcomes: dict[str, Outcome], found: list[Finding]
) -> Report:
    settings: Settings = (str(config_file(args)), args.overrides)
    torch = outcomes["pytorch"].result
    run = _describe_run(config, args.ranks, host, torch)
    batch_changes = fix_batch_sizes(run)
    run = applied(run, batch_changes)
    run = dataclasses.replace(run, stage=_stage(args.ds_config, run), dali_works=_dali_works(outcomes["dali"], run))
    print_progress("training a small model on the kernels")
    kernels = run_probe("kernels", {"settings": settings})
    found = [*found, *_judge_installation(run, host, outcomes, kernels, needs_deepspeed=args.ds_config is not None)]

    kernels_work = bool(kernels.result) and not any("problem" in entry for entry in kernels.result["operations"])
    if not kernels_work:
        # A wrong value has been reported. The loader samples masks, and would only report it again.
        os.environ.pop("FASTJEPA_KERNELS", None)
    loader = _measure_loader(run, settings)
    run = dataclasses.replace(run, loader=_rates(loader))
    to_start = suggest(run)
    step = Outcome({})
    if kernels_work:
        changes = [*batch_changes, *to_start]
        with_loader = bool(run.loader)
        step = _measure_step(
            applied(run, to_start), settings, changes, threads=torch["threads"], with_loader=with_loader
        )
    link = _measure_link(run)
    run = dataclasses.replace(
        run,
        step=_rates(step),
        estimated_step=step.result.get("estimated_images_per_second"),
        link=Link(**link.result) if link.result else None,
    )
    suggestions = suggest(run)
    verdict = find_limit(run)
    advice = what_to_do(run, verdict, suggestions)
    all_suggestions = [*batch_changes, *suggestions]
    images = loader.result.get("images", 0)
    return Report(
        installation=found,
        run=[
            *judge_run.judge_batches(run, batch_changes),
            *judge_run.judge_memory(verdict, advice, run, step),
            *judge_run.judge_data(run, loader),
            *judge_run.judge_step(run, step, verdict),
            *judge_run.judge_link(run, link),
            *judge_run.judge_run_folder(config, images),
        ],
        verdict=f"{verdict.sentence}. {advice}",
        duration=judge_run.estimate_duration(run, verdict, suggestions, images, step.result.get("with_loader")),
        limit=verdict.limit,
        suggestions=all_suggestions,
        command=start_command(run, args.config, args.overrides, args.ds_config, all_suggestions),
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


def _describe_run(config: Config, ranks: int | None, host: HostFacts, torch: dict[str, Any]) -> Run:
    """The run as far as it is known before anything is measured."""
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


def _dali_works(dali: Outcome, run: Run) -> bool:
    findings = judge_installation.judge_dali(dali, loader="dali", gpu=run.gpu)
    return all(finding.level == "ok" for finding in findings)


def _measure_loader(run: Run, settings: Settings) -> Outcome:
    """Measure the loader with the run's number of threads, with one, and with all, half and a quarter of the cores."""
    most = max(1, int(run.cores))
    threads = sorted({run.config.data.num_threads, 1, most, most // 2, most // 4} - {0})
    print_progress(f"measuring the loader with data.num_threads = {_listed(threads)}")
    arguments = {"settings": settings, "threads": threads, "micro": run.sizes.micro, "seconds": _LOADER_SECONDS}
    return run_probe("loader", arguments)


def _measure_step(
    run: Run, settings: Settings, suggestions: list[Suggestion], *, threads: int, with_loader: bool
) -> Outcome:
    """Measure the step at the micro batch, and on a GPU at larger ones that fit; nothing if not even the first fits."""
    micro, share = run.sizes.micro, run.config.global_batch_size // run.ranks
    sizes = [micro, *(n for n in (2 * micro, 4 * micro) if run.gpu and share % n == 0)]
    sizes = [n for n in sizes if run.memory_needed(n) <= run.memory]
    if not sizes:
        return Outcome({})
    print_progress(f"measuring the step with micro batches of {_listed(sizes)} images")
    config, overrides = settings
    arguments = [s.argument for s in suggestions if not s.key.startswith("--")]
    if not run.gpu:  # on a CPU the ranks share the cores
        threads = max(1, threads // run.ranks)
    given = {
        "settings": (config, [*overrides, *arguments]),
        "sizes": sizes,
        "threads": threads,
        "with_loader": with_loader,
    }
    return run_probe("step", {**given, "seconds": _STEP_SECONDS})


def _measure_link(run: Run) -> Outcome:
    if run.ranks == 1:
        return Outcome({})
    print_progress(f"measuring how fast {run.ranks} ranks send to one another")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(run.ranks))
    return run_probe("link", {}, launcher)


def _listed(numbers: list[int]) -> str:
    """1, 2 and 4."""
    *most, last = map(str, numbers)
    return f"{', '.join(most)} and {last}" if most else last


def _rates(outcome: Outcome) -> dict[int, Rate]:
    """The rates of a probe; JSON made text of their numbers of threads or images."""
    rates: dict[str, dict[str, float]] = outcome.result.get("rates", {})
    return {int(key): Rate(rate["images_per_second"], rate["cpu_seconds"]) for key, rate in rates.items()}


def _judge_installation(
    run: Run, host: HostFacts, outcomes: dict[str, Outcome], kernels: Outcome, *, needs_deepspeed: bool
) -> Iterator[Finding]:
    """Judge what depends on the run; host and PyTorch were judged before."""
    yield from judge_installation.judge_deepspeed(outcomes["deepspeed"], needed=needs_deepspeed)
    yield from judge_installation.judge_dali(outcomes["dali"], loader=run.config.data.loader, gpu=run.gpu)
    if "apex" in outcomes:
        yield from judge_installation.judge_apex(outcomes["apex"])
    yield from judge_installation.judge_kernels(kernels, gpu=run.gpu)
    yield from judge_installation.judge_cpu(host, outcomes["pytorch"].result["threads"], run.ranks, gpu=run.gpu)
    yield from judge_installation.judge_shm(host, run.ranks, gpu=run.gpu)
