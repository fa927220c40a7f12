"""The probes of the run: how fast are its loader, its step and the link between its ranks?

Each function runs in a process of its own (`probe_process`) and returns JSON. Packages that may be missing or broken, torch
among them, are imported inside.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from fastjepa.doctor.probe_installation import Settings, first_device

if TYPE_CHECKING:
    from fastjepa.config import Config
    from fastjepa.data import ImageDataset, Loader
    from fastjepa.profiling import SyntheticBatch


def loader(settings: Settings, threads: list[int], micro: int, seconds: float) -> dict[str, Any]:
    """Count the images of data.source, and measure the loader alone with each number of threads.

    Args:
        threads: numbers of threads to try.
        micro: images per batch.
        seconds: how long to measure each number of threads.
    """
    from fastjepa.data import open_dataset
    from fastjepa.errors import FastjepaError
    from fastjepa.objectives.registry import load_config

    run = load_config(*settings)
    bad: dict[str, None] = {}
    logging.getLogger("fastjepa.data.bad_samples").addHandler(_BadImageNames(bad))
    facts: dict[str, Any] = {"images": 0, "val_images": 0, "problem": None, "rates": {}}
    try:
        dataset = open_dataset(run.data, "train")
        assert dataset is not None
        facts["images"] = len(dataset)
        held_out = open_dataset(run.data, "val") if run.evaluate else None
        facts["val_images"] = len(held_out) if held_out else 0
        for index, count in enumerate(threads):
            # Start elsewhere in the epoch for each number, so that it reads images that may not be in memory yet.
            facts["rates"][str(count)] = _loader_rate(run, dataset, count, micro, seconds, index / len(threads))
    except FastjepaError as error:
        facts["problem"] = str(error)
    return facts | {"bad": list(bad)}


class _BadImageNames(logging.Handler):
    """Collects the images that `BadSamples` warns of, as "name: reason"."""

    def __init__(self, names: dict[str, None]) -> None:
        super().__init__()
        self._names = names

    def emit(self, record: logging.LogRecord) -> None:
        self._names[": ".join(map(str, record.args or ()))] = None


def _loader_rate(
    config: Config, dataset: ImageDataset, threads: int, micro: int, seconds: float, start: float
) -> dict[str, float]:
    """Images/s and CPU seconds per image.

    Args:
        start: share of an epoch at which the images begin, 0 to 1.
    """
    import dataclasses

    config = dataclasses.replace(config, data=dataclasses.replace(config.data, num_threads=threads))
    with _loader(config, dataset, min(8, len(dataset)), start) as some:
        next(some)  # the first call takes longer
        started = time.perf_counter()
        delivered = sum(next(some).prepared.num_images for _ in range(4))
        each = (time.perf_counter() - started) / delivered
    size = max(1, min(micro, len(dataset), int(seconds / 8 / each)))
    with _loader(config, dataset, size, start) as batches:
        for _ in range(config.data.prefetch + 1):  # these were prepared before the clock starts
            next(batches)
        images, cpu, started = 0, time.process_time(), time.perf_counter()
        while (took := time.perf_counter() - started) < seconds:
            images += next(batches).prepared.num_images
        cpu = time.process_time() - cpu
    return {"images_per_second": images / took, "cpu_seconds": cpu / images}


def _loader(config: Config, dataset: ImageDataset, size: int, start: float = 0.0) -> Loader:
    """The loader of a single rank, with batches of this size, from this share of an epoch on."""
    from fastjepa.data import Loader
    from fastjepa.objectives.registry import method_of

    steps = max(1, len(dataset) // size)
    return Loader(
        dataset, config, method_of(config), rank=0, world_size=1, micro_batch_size=size, grad_accum_steps=1,
        steps_per_epoch=steps, start_step=int(start * steps), total_steps=2**40, device=first_device(),
    )  # fmt: skip


def step(settings: Settings, sizes: list[int], threads: int, seconds: float, with_loader: bool) -> dict[str, Any]:
    """Measure the step of one rank on synthetic images, in plain PyTorch, with one optimizer step per micro batch.

    Args:
        sizes: micro batches to try. If the steps of one would take too long, a smaller one is measured instead.
        threads: threads of torch on a CPU.
        seconds: about how long to measure each micro batch; up to three times as long if one image takes that.
        with_loader: measure once more on the images of the loader.
    """
    import gc
    from pathlib import Path

    import torch

    from fastjepa.config.batch_sizes import BatchSizes
    from fastjepa.data import open_dataset
    from fastjepa.engine.base import resolve_precision
    from fastjepa.engine.build import build_engine
    from fastjepa.objectives.registry import build_objective, load_config, method_of
    from fastjepa.profiling import Steps, measure_ceilings, profile_steps, synthetic_batches

    config, device = load_config(*settings), first_device()
    if device.type == "cpu":
        torch.set_num_threads(threads)
    method = method_of(config)
    mean, _ = method.typical_tokens()
    ceiling = measure_ceilings(device, resolve_precision(config, device)).teraflops
    # Seconds per image. A step reaches at least half the ceiling, except where its matrices are tiny.
    estimate = method.step_flops(mean) / (0.5e12 * ceiling)
    facts: dict[str, Any] = {"ceiling_teraflops": ceiling, "estimated_images_per_second": 1 / estimate, "rates": {}}
    fewest = Steps(warmup=1, timed=2, traced=1)
    dataset = open_dataset(config.data, "train") if with_loader else None
    for size in sizes:
        micro = min(size, max(1, int(seconds / fewest.total / estimate)))
        if fewest.total * micro * estimate > 3 * seconds or str(micro) in facts["rates"]:
            continue
        timed = max(fewest.timed, min(60, int(seconds / micro / estimate) - fewest.total))
        steps, batch = Steps(warmup=min(timed, 3), timed=timed, traced=1), BatchSizes(micro, 1)
        cpu: list[float] = []  # CPU seconds of this process at the moment each batch was asked for
        try:
            engine = build_engine(build_objective(method), method, config, batch, device, None)
            noise = synthetic_batches(method, batch, device, steps.total)
            with tempfile.TemporaryDirectory() as folder:
                profile = profile_steps(engine, method, batch, _record_cpu_time(noise, cpu), Path(folder), steps)
                facts["rates"][str(micro)] = {
                    # The median leaves out the pauses of the machine.
                    "images_per_second": 1e3 * micro / profile.step_ms.p50,
                    "cpu_seconds": (cpu[steps.warmup + steps.timed] - cpu[steps.warmup]) / (steps.timed * micro),
                    "mfu": profile.mfu,
                    "peak_bytes": profile.memory.peak,
                }
                if dataset is not None and len(dataset) >= micro and "with_loader" not in facts:
                    with _loader(config, dataset, micro) as loaded:
                        profile = profile_steps(engine, method, batch, loaded, Path(folder), steps)
                    reached = profile.images_per_second
                    facts["with_loader"] = {"images_per_second": reached, "data_wait": profile.data_wait}
                    # Alone the step cannot be slower; if it was, the machine had less to give at that time.
                    alone = facts["rates"][str(micro)]
                    alone["images_per_second"] = max(alone["images_per_second"], reached)
            engine.close()
        except torch.OutOfMemoryError:  # raised on GPUs only
            facts["out_of_memory"] = micro
            break
        del engine, noise
        gc.collect()
        torch.cuda.empty_cache()
    return facts


def _record_cpu_time(batches: Iterable[SyntheticBatch], cpu: list[float]) -> Iterator[SyntheticBatch]:
    """Pass the batches on; append the CPU seconds of this process to `cpu` before each."""
    for batch in batches:
        cpu.append(time.process_time())
        yield batch


def link() -> dict[str, Any]:
    """Measure how fast the ranks of this machine send to one another. Run it on all ranks, under torchrun.

    Rank 0 returns the figures, the others nothing.
    """
    import torch
    import torch.distributed as dist

    from fastjepa import distributed

    device = distributed.init()
    ranks = distributed.world_size()

    def seconds(numel: int, times: int) -> float:
        values = torch.zeros(numel, device=device)
        dist.all_reduce(values)
        values.sum().item()  # waits for a GPU
        started = time.perf_counter()
        for _ in range(times):
            dist.all_reduce(values)
        values.sum().item()
        return (time.perf_counter() - started) / times

    numel = 16 * 2**20
    latency = seconds(1, 20)
    # In a ring, each rank sends 2 (R - 1) / R of the fp32 values.
    facts = {"bytes_per_second": 2 * (ranks - 1) / ranks * 4 * numel / seconds(numel, 5), "latency": latency}
    first = distributed.rank() == 0
    distributed.finish()
    return facts if first else {}
