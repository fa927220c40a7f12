"""Time, throughput and memory of one training step on synthetic images: python -m benchmarks.step [--models vit_tiny ...]

Every model is measured in a process of its own, so that its peak memory is its own. Masks are sampled beforehand: what is
timed is target, context, predictor, loss, backward and the optimizer step with EMA.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from fastjepa.batch_sizes import BatchSizes
from fastjepa.config import Config, DataConfig, MaskConfig, ModelConfig
from fastjepa.engine import build_engine
from fastjepa.masks import sample_masks
from fastjepa.metrics import peak_memory
from fastjepa.objective import build_model


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Medians over the timed steps of one model, in this process."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(args.threads)
    config = Config(
        data=DataConfig(image_size=args.image_size),
        model=ModelConfig(name=args.models[0]),
        masks=MaskConfig(mode=args.mask_mode),
        global_batch_size=args.batch_size,
        precision=args.precision,
    )
    engine = build_engine(build_model(config), config, BatchSizes.share(config, 1), device, None)
    images = torch.randn(args.batch_size, 3, *config.data.image_hw, generator=torch.Generator().manual_seed(0)).to(
        device
    )
    indices = torch.arange(args.batch_size)
    masks = [
        sample_masks(config.masks, config.grid_h, config.grid_w, seed=0, step=step, sample_indices=indices).to(device)
        for step in range(args.warmup + args.steps)
    ]
    seconds, context, targets = [], [], []
    for step, batch in enumerate(masks):
        started = time.perf_counter()
        engine.micro_step(images, batch)
        if device.type == "cuda":
            torch.cuda.synchronize()
        if step >= args.warmup:
            seconds.append(time.perf_counter() - started)
            context.append(batch.context.total / args.batch_size)
            targets.append(batch.target.total / args.batch_size)
    median = statistics.median(seconds)
    return {
        "model": args.models[0],
        "step_ms": 1e3 * median,
        "step_ms_p20_p80": [1e3 * statistics.quantiles(seconds, n=5)[i] for i in (0, 3)],
        "images_per_second": args.batch_size / median,
        "peak_memory_gib": peak_memory(device) / 2**30,
        "context_tokens": statistics.mean(context),
        "target_tokens": statistics.mean(targets),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__)
    parser.add_argument("--models", nargs="+", default=["vit_tiny", "vit_small", "vit_base"])
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--mask_mode", choices=["ragged", "official", "budget"], default="ragged")
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--json", help="also write the results to this file")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args)))
        return
    print(
        f"batch {args.batch_size}, {args.image_size} x {args.image_size}, {args.mask_mode} masks, {args.threads} threads"
    )
    print(f"{'model':<12}{'step ms':>10}{'p20-p80':>16}{'images/s':>10}{'memory GiB':>12}{'context':>9}{'targets':>9}")
    rows = []
    for model in args.models:
        command = [sys.executable, "-m", "benchmarks.step", "--child", *sys.argv[1:], "--models", model]
        row = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        low, high = row["step_ms_p20_p80"]
        print(
            f"{row['model']:<12}{row['step_ms']:>10.0f}{f'{low:.0f}-{high:.0f}':>16}{row['images_per_second']:>10.2f}"
            f"{row['peak_memory_gib']:>12.2f}{row['context_tokens']:>9.1f}{row['target_tokens']:>9.1f}",
            flush=True,
        )
        rows.append(row)
    if args.json:
        environment = {"torch": torch.__version__, "machine": platform.machine(), "threads": args.threads}
        results = {"environment": environment, "arguments": vars(args), "results": rows}
        Path(args.json).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
