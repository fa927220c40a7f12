"""Memory, step time and disk space of a long run: 20,000 tiny steps, whose memory and disk space must stay bounded.

python -m benchmarks.long_run [--steps 20000] [--ds_config configs/zero2.json] [--output benchmarks/results/long_run.json]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.launch import ROOT
from fastjepa.config import Config

MOST_GROWTH = 1.02
"""Allowed ratio of the peak memory at the end to that after the first tenth. (Step times are only printed: machines are
shared.)"""
BATCH = 8  # of configs/debug.yaml's 8,000 images: an epoch is 1,000 steps


def run(folder: Path, steps: int, ds_config: str | None) -> list[dict[str, Any]]:
    """Train configs/debug.yaml with a small batch; return its metrics, one line per hundred steps."""
    settings = [f"epochs={steps / 1000}", f"global_batch_size={BATCH}", "micro_batch_size=null", "log_interval=100"]
    command = [sys.executable, str(ROOT / "fastjepa" / "train.py"), "--config", str(ROOT / "configs" / "debug.yaml")]
    command += [*settings, "checkpoint_interval=1000", f"output_dir={folder}"]
    subprocess.run(command + (["--ds_config", ds_config] if ds_config else []), check=True, stderr=subprocess.DEVNULL)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def tenths(lines: list[dict[str, Any]]) -> dict[str, list[float]]:
    """The peak memory so far in MiB and the median milliseconds of a step, for each tenth of the run."""
    size = len(lines) // 10
    parts = [lines[i * size : (i + 1) * size] for i in range(10)]
    return {
        "peak_memory_mib": [round(part[-1]["memory_gib"] * 1024, 1) for part in parts],
        "step_ms": [round(median(1e3 * BATCH / line["images_per_second"] for line in part), 3) for part in parts],
    }


def disk(folder: Path) -> dict[str, Any]:
    """Bytes and files that the run left in its folder."""
    checkpoints = [path for path in (folder / "checkpoints").iterdir() if path.is_dir()]
    return {
        "metrics_bytes": (folder / "metrics.jsonl").stat().st_size,
        "checkpoints": len(checkpoints),
        "checkpoint_bytes": sum(path.stat().st_size for each in checkpoints for path in each.iterdir()),
        "files": sum(path.is_file() for path in folder.rglob("*")),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.long_run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=20_000, help="1000 or more (default: %(default)s)")
    parser.add_argument(
        "--ds_config", help="a DeepSpeed configuration, such as configs/zero2.json (default: plain PyTorch)"
    )
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    options = parser.parse_args()
    if options.steps < 1000:
        parser.error(f"--steps {options.steps}: expected 1000 or more: each tenth of the run needs a line of metrics")
    with tempfile.TemporaryDirectory() as folder:
        lines = run(Path(folder), options.steps, options.ds_config)
        result = {"steps": options.steps, "ds_config": options.ds_config, **tenths(lines), **disk(Path(folder))}
    for name, value in result.items():
        print(f"{name:18s} {value}")
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    first, *_, last = result["peak_memory_mib"]
    if last > MOST_GROWTH * first or result["checkpoints"] > Config.keep_last:
        print(
            f"not bounded: memory grew {last / first:.3f} times (expected at most {MOST_GROWTH}), "
            f"{result['checkpoints']} checkpoints are kept (expected at most {Config.keep_last})"
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
