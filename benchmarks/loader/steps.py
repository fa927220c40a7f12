"""python -m benchmarks.loader --step: training on the Loader's batches and on images that lie ready, in turns."""

from __future__ import annotations

import statistics
import time
from contextlib import closing
from pathlib import Path

import torch

from benchmarks.loader.contestants import open_loader
from benchmarks.loader.photographs import make_photographs
from fastjepa.config import Config, DataConfig, ModelConfig
from fastjepa.config.batch_sizes import BatchSizes
from fastjepa.data import Batch
from fastjepa.engine.build import build_engine
from fastjepa.objectives.ijepa.objective import MaskedImages
from fastjepa.objectives.ijepa.settings import IJEPAConfig
from fastjepa.objectives.registry import build_objective, method_of
from fastjepa.profiling.timing import summary


def compare_steps(folder: Path, model: str, batch_size: int, threads: int, rounds: int, device: torch.device) -> None:
    """Print the milliseconds of a step on real and on synthetic images, and those of waiting for data.

    Each round is a block of steps on real images and one on synthetic images, with the same masks and so the same work. A
    block begins with as many untimed steps as the Loader prefetches batches, so that in the timed ones it prepares as many
    batches as are taken.
    """
    make_photographs(folder, (500, 375), 8 * batch_size)
    config = Config(
        data=DataConfig(source=str(folder), num_threads=threads),
        model=ModelConfig(name=model),  # type: ignore[arg-type]
        objective=IJEPAConfig(),
        global_batch_size=batch_size,
    )
    untimed, timed = config.data.prefetch, 20 if device.type == "cuda" else 4
    method = method_of(config)
    engine = build_engine(build_objective(method), method, config, BatchSizes.share(config, 1), device, None)
    shape = (batch_size, 3, *config.data.image_hw)
    ready = [torch.randint(256, shape, dtype=torch.uint8, device=device) for _ in range(untimed + timed)]
    real_ms, ready_ms, waits_ms, masks_ms = [], [], [], []

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    with closing(open_loader(config, device)) as loader:
        for turn in range(rounds + 1):
            batches: list[Batch] = []
            waits: list[float] = []
            for number in range(untimed + timed):
                if number == untimed:
                    started = now()
                asked = time.perf_counter()
                batches.append(next(loader))
                waits.append(1e3 * (time.perf_counter() - asked))
                engine.micro_step(batches[-1].prepared)
            on_real = 1e3 * (now() - started) / timed
            for number, (images, batch) in enumerate(zip(ready, batches, strict=True)):
                if number == untimed:
                    started = now()
                assert isinstance(batch.prepared, MaskedImages)
                engine.micro_step(MaskedImages(images, batch.prepared.masks))
            on_ready = 1e3 * (now() - started) / timed
            if turn > 0:  # the first round is the warm-up
                real_ms.append(on_real)
                ready_ms.append(on_ready)
                waits_ms += waits[untimed:]
                masks_ms += [1e3 * batch.seconds.prepare for batch in batches[untimed:]]
    real, synthetic = summary(real_ms), summary(ready_ms)
    wait, masks = statistics.mean(waits_ms), statistics.median(masks_ms)
    print(
        f"{model}, batch {batch_size}, JPEG files of 500x375, {rounds} x {timed} steps of each kind in turns, ms per step:"
    )
    print(f"  real images       {real.p50:>9.1f} ({real.p20:.1f}-{real.p80:.1f}), of which waiting for data {wait:.2f}")
    print(f"  synthetic images  {synthetic.p50:>9.1f} ({synthetic.p20:.1f}-{synthetic.p80:.1f})")
    print(f"  real / synthetic  {real.p50 / synthetic.p50:>9.3f}")
    print(f"  sampling masks    {masks:>9.2f}, beside the step: {100 * masks / real.p50:.2f} % of its time")
