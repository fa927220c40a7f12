"""python -m benchmarks.kernels [--ops ...] [--shapes ...]: every provider beside the others, checked, then timed in turns.

Prints a table; --output FOLDER also writes kernels.csv and a picture. Times are those of this machine; rates are against the
least work that the operation can do (benchmarks.kernel_cases), so a provider that pads or copies shows a lower one.
"""

from __future__ import annotations

import argparse
import csv
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernel_cases import shapes
from benchmarks.kernels.contest import Contest
from benchmarks.kernels.contests import CONTESTS
from fastjepa.profiling.timing import Ceilings, Timing, measure_ceilings, time_in_turns

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Row:
    contest: Contest
    provider: str
    timing: Timing
    gigabytes_per_second: float
    teraflops: float
    share: float
    """Of the ceiling that binds: the least time that the work can take on this machine, over the median."""


def measure(
    contest: Contest, device: torch.device, ceilings: Ceilings, repeats: int
) -> tuple[list[Row], dict[str, str]]:
    """The right providers' rows, fastest first, and why the others have none."""
    missing = contest.providers.absent | contest.wrong()
    present = {name: timed for name, timed in contest.providers.present.items() if name not in missing}
    timings = time_in_turns(present, device, repeats=repeats)
    rows = []
    for name, timing in timings.items():
        gigabytes = contest.work.bytes / timing.p50 / 1e6
        teraflops = contest.work.flops / timing.p50 / 1e9
        share = max(gigabytes / ceilings.gigabytes_per_second, teraflops / ceilings.teraflops)
        rows.append(Row(contest, name, timing, gigabytes, teraflops, share))
    return sorted(rows, key=lambda row: row.timing.p50), missing


def report(rows: Sequence[Row], missing: dict[str, str], contest: Contest) -> None:
    print(f"\n{contest.op}, {contest.part}, {contest.shape}")
    for row in rows:
        t = row.timing
        print(
            f"  {row.provider:<36}{t.p50:>10.3f} ms ({t.p20:.3f}-{t.p80:.3f}){row.gigabytes_per_second:>9.1f} GB/s"
            f"{row.teraflops:>8.2f} TFLOP/s{100 * row.share:>6.0f} % of the bound"
        )
    for name, reason in missing.items():
        print(f"  {name:<36}{'-':>10}    {reason}")


def environment(device: torch.device) -> dict[str, str]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    return {"device": name, "torch": torch.__version__, "threads": str(torch.get_num_threads())}


def as_record(row: Row) -> dict[str, Any]:
    contest = row.contest
    return {
        "op": contest.op,
        "part": contest.part,
        "shape": contest.shape,
        "dtype": str(contest.dtype).removeprefix("torch."),
        "provider": row.provider,
        "p20_ms": row.timing.p20,
        "p50_ms": row.timing.p50,
        "p80_ms": row.timing.p80,
        "gb_per_s": row.gigabytes_per_second,
        "tflop_per_s": row.teraflops,
        "share_of_bound": row.share,
    }


def write_csv(rows: Sequence[Row], device: torch.device, path: Path) -> None:
    records = [as_record(row) | environment(device) for row in rows]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, records[0])
        writer.writeheader()
        writer.writerows(records)


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    parser.add_argument("--ops", nargs="+", choices=CONTESTS, default=list(CONTESTS))
    parser.add_argument("--shapes", nargs="+", choices=shapes(1), default=list(shapes(1)) if cuda else ["S/16"])
    parser.add_argument("--batch_size", type=int, default=128 if cuda else 16)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16" if cuda else "fp32")
    parser.add_argument("--repeats", type=int, default=50 if cuda else 9)
    parser.add_argument("--output", type=Path, help="also write kernels.csv and kernels.png into this folder")
    args = parser.parse_args()
    device, dtype = torch.device("cuda" if cuda else "cpu"), DTYPES[args.dtype]
    torch.manual_seed(0)
    ceilings = measure_ceilings(device, dtype)
    print(
        ", ".join(f"{key} {value}" for key, value in environment(device).items()), f"batch {args.batch_size}", sep=", "
    )
    print(
        f"ceilings: copy {ceilings.gigabytes_per_second:.1f} GB/s, matmul {ceilings.teraflops:.3f} TFLOP/s ({args.dtype})"
    )
    rows: list[Row] = []
    for name, shape in shapes(args.batch_size).items():
        for op in args.ops if name in args.shapes else []:
            for contest in CONTESTS[op](shape, device, dtype):
                mine, missing = measure(contest, device, ceilings, args.repeats)
                report(mine, missing, contest)
                rows += mine
    if args.output:
        from benchmarks.kernels.plot import plot

        args.output.mkdir(parents=True, exist_ok=True)
        write_csv(rows, device, args.output / "kernels.csv")
        plot([as_record(row) for row in rows], environment(device), args.output / "kernels.png")


if __name__ == "__main__":
    main()
