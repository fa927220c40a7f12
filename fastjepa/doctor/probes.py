"""Looking and measuring in processes of their own, so that what crashes, hangs or runs out of memory is cut off and told.

A probe is a function of this module: keyword arguments and result are JSON. `start` runs it as
`python -m fastjepa.doctor.probes NAME`; modules that may not be there, torch among them, are imported inside.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastjepa.errors import FastjepaError

if TYPE_CHECKING:
    import torch

    from fastjepa.config import Config
    from fastjepa.data import ImageDataset, Loader
    from fastjepa.profiling import SyntheticBatch

Settings = tuple[str | None, list[str]]
"""Of a run, as `load_config` reads them: the YAML file, and what the command line adds."""

CUT_OFF = {
    "pytorch": 60,
    "deepspeed": 60,
    "dali": 90,
    "apex": 60,
    "kernels": 400,
    "loader": 120,
    "step": 400,
    "link": 60,
}
"""Seconds after which a probe is stopped. Most end in a few; the first time on a GPU, kernels are compiled."""
_MARK = "fastjepa-probe: "  # before the result: libraries print, too


@dataclass(frozen=True)
class Outcome:
    """Of a probe: a result, or why there is none."""

    result: dict[str, Any]
    failure: str | None = None


class Running:
    """A probe that runs. As a context it is ended with the block."""

    def __init__(self, name: str, arguments: dict[str, Any] | None = None, launcher: Sequence[str] = ()) -> None:
        self._seconds = CUT_OFF[name]
        self._until = time.monotonic() + self._seconds
        self._output = tempfile.TemporaryFile()  # noqa: SIM115  # closed by __exit__
        self._process = subprocess.Popen(
            [sys.executable, *launcher, "-m", "fastjepa.doctor.probes", name, json.dumps(arguments or {})],
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # to be ended with all processes that it started
        )

    @property
    def pid(self) -> int:
        """Of the process, and of the group of all that it starts."""
        return self._process.pid

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        self._output.close()

    def outcome(self) -> Outcome:
        """Waits for the end, or for the time to be over."""
        try:
            status = self._process.wait(max(0.0, self._until - time.monotonic()))
        except subprocess.TimeoutExpired:
            return Outcome({}, f"did not end within {self._seconds:g} s, and was stopped")
        self._output.seek(0)
        lines = self._output.read().decode(errors="replace").splitlines()
        for line in reversed(lines):
            if line.startswith(_MARK):
                return Outcome(json.loads(line.removeprefix(_MARK)))
        if status == -signal.SIGKILL:
            return Outcome({}, "was killed, as Linux does with a process when memory runs out")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "without a word")
        how = f"by signal {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
        return Outcome({}, f"ended {how}: {last}")


def outcome_of(name: str, arguments: dict[str, Any], launcher: Sequence[str] = ()) -> Outcome:
    with Running(name, arguments, launcher) as probe:
        return probe.outcome()


def say(what: str) -> None:
    """That something goes on which takes seconds."""
    print(f"{what} ...", file=sys.stderr, flush=True)


# The installation


def pytorch() -> dict[str, Any]:
    """torch, its GPUs (each computes something), and whether all of fastjepa can be imported."""
    import torch

    facts: dict[str, Any] = {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "cpu_bf16": bool(torch.cpu._is_avx512_bf16_supported()),
        "gpus": [],
        "gpu_problem": None,
    }
    if torch.version.cuda:
        try:
            torch.cuda.init()
            facts["gpus"] = [_gpu(index) for index in range(torch.cuda.device_count())]
            facts["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        except (RuntimeError, AssertionError) as error:  # of many kinds: no driver, too old a driver, a broken GPU
            facts["gpu_problem"] = str(error).strip().partition("\n")[0]
    try:
        import fastjepa.data
        import fastjepa.engine.build
        import fastjepa.evaluate  # noqa: F401
    except ImportError as error:
        facts["import_problem"] = f"{type(error).__name__}: {error}"
    return facts


def _gpu(index: int) -> dict[str, Any]:
    import torch

    device = torch.device("cuda", index)
    ones = torch.ones(64, 64, device=device)
    if (ones @ ones).sum().item() != 64**3:
        raise RuntimeError(f"GPU {index} computes a wrong product of matrices")
    free, total = torch.cuda.mem_get_info(device)
    properties = torch.cuda.get_device_properties(device)
    capability = [properties.major, properties.minor]
    return {"name": properties.name, "capability": capability, "memory": total, "free": free}


def deepspeed() -> dict[str, Any]:
    """Whether it can be imported, as `fastjepa.engine` does it."""
    import importlib

    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    importlib.import_module("deepspeed")
    return {"imported": True}


def apex() -> dict[str, Any]:
    from fastjepa_kernels._backend import apex_problem

    return {"problem": apex_problem()}


def dali(rounds: int = 10) -> dict[str, Any]:
    """DALI beside libjpeg-turbo on a fixed set of JPEG files, on the GPU where there is one: several times, because a
    hardware decoder is reported to race. The differences are in levels of 255: of one image's mean, and among the rounds."""
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np
    import simplejpeg
    import torch

    from fastjepa.config import DataConfig
    from fastjepa.data.decode.cpu import CPUDecoder
    from fastjepa.data.decode.dali import DaliDecoder, dali_problem
    from fastjepa.data.decode.images import read_header

    if problem := dali_problem():
        return {"problem": problem}
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    files = []
    for height, width in ((97, 131), (240, 320), (375, 500), (768, 513)) * 4:
        y, x = np.mgrid[:height, :width]
        waves = [np.sin(x / a) * np.cos(y / b) for a, b in ((9, 14), (23, 11), (17, 31))]
        pixels = (127.5 + 120 * np.stack(waves, 2)).astype(np.uint8)
        files.append(simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality=90, colorsubsampling="420"))
    images = [read_header(file, 10**6) for file in files]
    boxes = np.array([(0, 0, image.height, image.width) for image in images], np.int32)
    flips = np.zeros(len(images), bool)
    config = DataConfig(image_size=(64, 96), loader="dali", dct_scaling=False)
    with ThreadPoolExecutor(config.num_threads) as pool:
        on_cpu = CPUDecoder(config, pool)
        expected = on_cpu.decode(images, boxes, flips).float()
        decoder = DaliDecoder(config, device, len(images), on_cpu, num_threads=2)
        decoded = [decoder.decode(images, boxes, flips).cpu().float() for _ in range(rounds)]
    difference = max((one - expected).abs().mean((1, 2, 3)).max().item() for one in decoded)
    unlike = max((one - decoded[0]).abs().max().item() for one in decoded)
    return {"problem": None, "device": device.type, "difference": difference, "unlike": unlike}


def kernels(settings: Settings) -> dict[str, Any]:
    """Which implementation of each operation a run would use, why not those before it, and whether two training steps of
    a small model on them give the loss that PyTorch's plain paths give."""
    import torch

    import fastjepa_kernels
    from fastjepa.config import KernelsConfig
    from fastjepa.config.file import load_config
    from fastjepa.engine.base import resolve_precision
    from fastjepa.errors import ConfigError

    run, device = load_config(*settings), _device()
    dtype, size = resolve_precision(run, device), run.model.size
    head_dims = sorted({size.embed_dim // size.num_heads, run.model.predictor_embed_dim // size.num_heads})
    inputs: list[tuple[str, torch.dtype, int]] = [
        ("masked_gather", dtype, 0),
        *(("block_attention", dtype, head_dim) for head_dim in head_dims),
        ("adamw_ema", torch.float32, 0),
        ("mask_sampling", torch.int64, 0),
        ("target_loss", dtype, 0),
        ("linear", dtype, 0),
    ]
    chosen: list[dict[str, Any]] = []
    for op, kind, head_dim in inputs:
        entry = {"operation": op, "head_dim": head_dim}
        try:
            fastjepa_kernels.request({op: getattr(run.kernels, op)})
            others = fastjepa_kernels.implementations(op, device.type, kind, head_dim)
            entry["chosen"] = fastjepa_kernels.choose(op, device.type, kind, head_dim)
            entry["others"] = {name: reason for name, reason in others.items() if reason}
        except ValueError as error:
            entry["problem"] = str(error)
        chosen.append(entry)
    facts: dict[str, Any] = {"dtype": str(dtype).removeprefix("torch."), "operations": chosen, "agreement": None}
    if not any("problem" in entry for entry in chosen):
        try:
            mine = _small_loss(run.kernels, device)
            os.environ.pop("FASTJEPA_KERNELS", None)
            torch_only = dict.fromkeys(KernelsConfig.__dataclass_fields__, "torch") | {"block_attention": "padded"}
            facts["agreement"] = abs(mine / _small_loss(KernelsConfig(**torch_only), device) - 1)  # type: ignore[arg-type]
        except (
            ConfigError
        ) as error:  # what was asked for takes the run's dtype and head dim, but not those of the small run
            facts["not_compared"] = str(error)
    return facts


def _small_loss(kernels: Any, device: torch.device) -> float:
    """Of the second step, in fp32: it passed every kernel forward and backward, and the optimizer."""
    import torch

    from fastjepa.config import Config, DataConfig, ModelConfig
    from fastjepa.config.batch_sizes import BatchSizes
    from fastjepa.engine.build import build_engine
    from fastjepa.objectives.ijepa.masks import sample_masks
    from fastjepa.objectives.ijepa.objective import build_model

    model = ModelConfig(embed_dim=64, depth=2, num_heads=2, predictor_embed_dim=32, predictor_depth=2, init="fan_in")
    data = DataConfig(image_size=96)
    config = Config(model=model, data=data, global_batch_size=4, precision="fp32", kernels=kernels)
    engine = build_engine(build_model(config), config, BatchSizes(4, 1), device, None)
    generator = torch.Generator().manual_seed(0)
    loss = math.nan
    for step in range(2):
        pixels = torch.randint(0, 256, (4, 3, 96, 96), dtype=torch.uint8, generator=generator)
        indices = torch.arange(4, device=device)
        masks = sample_masks(config.masks, config.grid_h, config.grid_w, seed=0, step=step, sample_indices=indices)
        loss = engine.micro_step(pixels.to(device), masks).item()
    return loss


# The run


def loader(settings: Settings, threads: list[int], micro: int, seconds: float) -> dict[str, Any]:
    """What data.source holds, and how fast the loader alone delivers it with so many threads.

    Args:
        micro: images per batch.
        seconds: for each number of threads.
    """
    from fastjepa.config.file import load_config
    from fastjepa.data import open_dataset
    from fastjepa.errors import FastjepaError

    run = load_config(*settings)
    bad: dict[str, None] = {}
    logging.getLogger("fastjepa.data.bad_samples").addHandler(_Names(bad))
    facts: dict[str, Any] = {"images": 0, "val_images": 0, "problem": None, "rates": {}}
    try:
        dataset = open_dataset(run.data, "train")
        assert dataset is not None
        facts["images"] = len(dataset)
        held_out = open_dataset(run.data, "val") if run.evaluate else None
        facts["val_images"] = len(held_out) if held_out else 0
        for part, count in enumerate(threads):
            facts["rates"][str(count)] = _rate(run, dataset, count, micro, seconds, part / len(threads))
    except FastjepaError as error:
        facts["problem"] = str(error)
    return facts | {"bad": list(bad)}


class _Names(logging.Handler):
    """Collects what `BadSamples` says: name and reason."""

    def __init__(self, names: dict[str, None]) -> None:
        super().__init__()
        self._names = names

    def emit(self, record: logging.LogRecord) -> None:
        self._names[": ".join(map(str, record.args or ()))] = None


def _rate(
    config: Config, dataset: ImageDataset, threads: int, micro: int, seconds: float, part: float
) -> dict[str, float]:
    """Images/s and CPU seconds per image; the images begin at this part of an epoch, so that each number of threads sees
    others, which may not be in memory yet."""
    import dataclasses

    config = dataclasses.replace(config, data=dataclasses.replace(config.data, num_threads=threads))
    with _loader(config, dataset, min(8, len(dataset)), part) as some:  # how long one takes; first calls take longer
        next(some)
        started = time.perf_counter()
        delivered = sum(next(some).masks.num_images for _ in range(4))
        each = (time.perf_counter() - started) / delivered
    size = max(1, min(micro, len(dataset), int(seconds / 8 / each)))
    with _loader(config, dataset, size, part) as batches:
        for _ in range(config.data.prefetch + 1):  # what was prepared before anybody waited
            next(batches)
        images, cpu, started = 0, time.process_time(), time.perf_counter()
        while (took := time.perf_counter() - started) < seconds:
            images += next(batches).masks.num_images
        cpu = time.process_time() - cpu
    return {"images_per_second": images / took, "cpu_seconds": cpu / images}


def _loader(config: Config, dataset: ImageDataset, size: int, part: float = 0.0) -> Loader:
    """Batches of this size, from this part of an epoch on."""
    from fastjepa.data import Loader

    steps = max(1, len(dataset) // size)
    return Loader(
        dataset, config, rank=0, world_size=1, micro_batch_size=size, grad_accum_steps=1, steps_per_epoch=steps,
        start_step=int(part * steps), total_steps=2**40, device=_device(),
    )  # fmt: skip


def step(settings: Settings, sizes: list[int], threads: int, seconds: float, real: bool) -> dict[str, Any]:
    """How fast one rank's step is on images that cost nothing, by plain PyTorch, an optimizer step for each micro batch.

    Args:
        sizes: micro batches to try. A smaller one takes the place of one whose steps would take too long.
        threads: of torch, on a CPU.
        seconds: for each of them, about; three times as long if one image takes that.
        real: measure once more behind the loader.
    """
    import gc
    from pathlib import Path

    import torch

    from fastjepa.config.batch_sizes import BatchSizes
    from fastjepa.config.file import load_config
    from fastjepa.data import open_dataset
    from fastjepa.engine.base import resolve_precision
    from fastjepa.engine.build import build_engine
    from fastjepa.objectives.ijepa import costs
    from fastjepa.objectives.ijepa.objective import build_model
    from fastjepa.profiling import Steps, measure_ceilings, profile_steps, synthetic_batches

    config, device = load_config(*settings), _device()
    if device.type == "cpu":
        torch.set_num_threads(threads)
    mean, _ = costs.sample_tokens(config.masks, config.grid_h, config.grid_w)
    ceiling = measure_ceilings(device, resolve_precision(config, device)).teraflops
    # Of an image; half the ceiling is what a step reaches at least, but where its parts are tiny.
    reckoned = costs.flops_per_image(config, mean) / (0.5e12 * ceiling)
    facts: dict[str, Any] = {"ceiling_teraflops": ceiling, "reckoned_images_per_second": 1 / reckoned, "rates": {}}
    fewest = Steps(warmup=1, timed=2, traced=1)
    dataset = open_dataset(config.data, "train") if real else None
    for size in sizes:
        micro = min(size, max(1, int(seconds / fewest.total / reckoned)))
        if fewest.total * micro * reckoned > 3 * seconds or str(micro) in facts["rates"]:
            continue
        timed = max(fewest.timed, min(60, int(seconds / micro / reckoned) - fewest.total))
        steps, batch = Steps(warmup=min(timed, 3), timed=timed, traced=1), BatchSizes(micro, 1)
        cpu: list[float] = []  # used by this process, when each batch was asked for
        try:
            engine = build_engine(build_model(config), config, batch, device, None)
            noise = synthetic_batches(config, batch, device, steps.total)
            with tempfile.TemporaryDirectory() as folder:
                profile = profile_steps(engine, config, batch, _noting(noise, cpu), Path(folder), steps)
                facts["rates"][str(micro)] = {
                    # Of the median step: a pause of the machine is not the step's.
                    "images_per_second": 1e3 * micro / profile.step_ms.p50,
                    "cpu_seconds": (cpu[steps.warmup + steps.timed] - cpu[steps.warmup]) / (steps.timed * micro),
                    "mfu": profile.mfu,
                    "peak_bytes": profile.memory.peak,
                }
                if dataset is not None and len(dataset) >= micro and "together" not in facts:
                    with _loader(config, dataset, micro) as loaded:
                        profile = profile_steps(engine, config, batch, loaded, Path(folder), steps)
                    reached = profile.images_per_second
                    facts["together"] = {"images_per_second": reached, "data_wait": profile.data_wait}
                    alone = facts["rates"][str(micro)]  # cannot be less, but on a machine that had less to give then
                    alone["images_per_second"] = max(alone["images_per_second"], reached)
            engine.close()
        except torch.OutOfMemoryError:  # of a GPU
            facts["out_of_memory"] = micro
            break
        del engine, noise
        gc.collect()
        torch.cuda.empty_cache()
    return facts


def _noting(batches: Iterable[SyntheticBatch], cpu: list[float]) -> Iterator[SyntheticBatch]:
    for batch in batches:
        cpu.append(time.process_time())
        yield batch


def link() -> dict[str, Any]:
    """How fast ranks on this machine send to one another. For all ranks, under torchrun."""
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
    facts = {"bytes_per_second": 2 * (ranks - 1) / ranks * 4 * numel / seconds(numel, 5), "latency": latency}
    first = distributed.rank() == 0
    distributed.finish()
    return facts if first else {}


def _device() -> torch.device:
    import torch

    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


PROBES = {probe.__name__: probe for probe in (pytorch, deepspeed, apex, dali, kernels, loader, step, link)}


def main() -> None:
    name, arguments = sys.argv[1], json.loads(sys.argv[2])
    try:
        result = PROBES[name](**arguments)
    except FastjepaError as error:
        sys.exit(str(error))
    if result:  # of a link, the first rank's
        print(_MARK + json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
