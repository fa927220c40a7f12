"""Check and time every provider of an operation, taking turns: python -m benchmarks.kernels [--ops ...] [--shapes ...]

Prints a table. --output FOLDER also writes kernels.csv and two pictures: times (kernels.png), and rates under the
best that this machine reaches (kernels_roofline.png). Rates count the least work that the operation needs
(benchmarks.kernel_cases), so a provider that pads or copies shows a lower rate.

--compare REV instead times fastjepa's kernels of git revision REV against those of the working tree, taking turns.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernel_cases import Choice, shapes
from benchmarks.kernels.compare import compare, print_comparison
from benchmarks.kernels.contest import Contest
from benchmarks.kernels.contests import CONTESTS, DTYPES, chosen
from fastjepa.errors import ConfigError, FastjepaError
from fastjepa.profiling.timing import Ceilings, CeilingWork, Timing, device_name, time_in_turns
from fastjepa.run.folder import explain_write_errors


@dataclass(frozen=True)
class Row:
    """The result of one provider in one contest."""

    contest: Contest
    provider: str
    timing: Timing
    ceilings: Ceilings

    @property
    def gigabytes_per_second(self) -> float:
        return self.contest.work.bytes / self.timing.p50 / 1e6

    @property
    def teraflops(self) -> float:
        return self.contest.work.flops / self.timing.p50 / 1e9

    @property
    def share(self) -> float:
        """The least time that the work can take on this machine (by memory or by arithmetic), over the median time."""
        return max(
            self.gigabytes_per_second / self.ceilings.gigabytes_per_second, self.teraflops / self.ceilings.teraflops
        )


def measure(
    contest: Contest, device: torch.device, work: CeilingWork, repeats: int
) -> tuple[list[Row], dict[str, str]]:
    """Time the providers that give the right answer, and the machine's ceilings, in turns.

    Returns:
        A row for each of these providers, fastest first; and by name why the others have none.
    """
    present, missing = contest.contestants()
    timings = time_in_turns({**present, **work.functions}, device, repeats=repeats)
    ceilings = work.ceilings(timings)
    rows = [Row(contest, name, timings[name], ceilings) for name in present]
    return sorted(rows, key=lambda row: row.timing.p50), missing


def print_results(rows: Sequence[Row], missing: dict[str, str], contest: Contest) -> None:
    print(f"\n{contest.title}")
    if rows:
        ceilings = rows[0].ceilings
        print(f"  copy {ceilings.gigabytes_per_second:.1f} GB/s, matrix product {ceilings.teraflops:.3f} TFLOP/s")
    for row in rows:
        t = row.timing
        arithmetic = f"{row.teraflops:>9.3f} TFLOP/s" if contest.work.flops else ""
        print(
            f"  {row.provider:<36}{t.p50:>10.3f} ms ({t.p20:.3f}-{t.p80:.3f}){row.gigabytes_per_second:>9.1f} GB/s"
            f"{arithmetic}{100 * row.share:>6.0f} % of the bound"
        )
    for name, reason in missing.items():
        print(f"  {name:<36}{'-':>10}    {reason}", flush=True)


def environment(device: torch.device) -> dict[str, str]:
    """The device that was timed, and versions of the software on it ("" for what is not installed)."""
    cuda = device.type == "cuda"
    return {
        "device": device_name(device),
        "driver": _driver() if cuda else "",
        "torch": torch.__version__,
        **{package: _version(package) for package in ("triton", "xformers", "apex", "flash_attn")},
        "threads": str(torch.get_num_threads()),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _driver() -> str:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ""
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    return subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()


def as_record(row: Row, batch_size: int) -> dict[str, Any]:
    """A row of kernels.csv, without the environment."""
    contest = row.contest
    numbers = {
        "p20_ms": row.timing.p20,
        "p50_ms": row.timing.p50,
        "p80_ms": row.timing.p80,
        "gb_per_s": row.gigabytes_per_second,
        "tflop_per_s": row.teraflops,
        "copy_gb_per_s": row.ceilings.gigabytes_per_second,
        "matmul_tflop_per_s": row.ceilings.teraflops,
        "share_of_bound": row.share,
    }
    return {
        "op": contest.op,
        "part": contest.part,
        "shape": contest.shape,
        "batch_size": batch_size,
        "dtype": str(contest.dtype).removeprefix("torch."),
        "provider": row.provider,
        "bytes": contest.work.bytes,
        "flops": contest.work.flops,
        **{name: float(f"{number:.6g}") for name, number in numbers.items()},
    }


def write(records: Sequence[dict[str, Any]], details: dict[str, str], folder: Path) -> None:
    """Write the table and the pictures; `details` is the `environment`."""
    from benchmarks.kernels.plot import plot_roofline, plot_times

    with (folder / "kernels.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*records[0], *details], lineterminator="\n")
        writer.writeheader()
        writer.writerows(record | details for record in records)
    plot_times(records, details, folder / "kernels.png")
    plot_roofline(records, details, folder / "kernels_roofline.png")


def main(arguments: list[str] | None = None) -> None:
    cuda = torch.cuda.is_available()
    assert __doc__
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ops", nargs="+", choices=CONTESTS, default=list(CONTESTS), help="operations (default: all)")
    every_shape = list(shapes(1))
    parser.add_argument(
        "--shapes",
        nargs="+",
        choices=every_shape,
        default=every_shape if cuda else ["S/16"],
        help="models (default: %(default)s)",
    )
    parser.add_argument("--batch_size", type=int, default=128 if cuda else 16, help="images (default: %(default)s)")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="bf16" if cuda else "fp32",
        help="dtype of activations (default: %(default)s)",
    )
    parser.add_argument(
        "--repeats", type=int, default=50 if cuda else 9, help="timed rounds, 2 or more (default: %(default)s)"
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--output", type=Path, help="also write kernels.csv and the pictures into this folder")
    where.add_argument("--compare", metavar="REV", help="instead compare with fastjepa_kernels of this git revision")
    args = parser.parse_args(arguments)
    if args.repeats < 2:
        parser.error(f"--repeats is {args.repeats}, expected 2 or more, for percentiles")
    if args.batch_size < 1:
        parser.error(f"--batch_size is {args.batch_size}, expected 1 or more")
    if args.output:
        try:  # before minutes of measuring, not after
            with explain_write_errors(f"--output {args.output}", "Choose another folder"):
                args.output.mkdir(parents=True, exist_ok=True)
        except FastjepaError as error:
            parser.error(str(error))
    device = torch.device("cuda" if cuda else "cpu")
    choice = Choice(args.ops, args.shapes, args.batch_size, args.dtype)
    details = environment(device)
    print(", ".join(f"{key} {value}" for key, value in details.items() if value), f"batch {args.batch_size}", sep=", ")
    if args.compare:
        try:
            print_comparison(*compare(args.compare, choice, args.repeats), args.compare)
        except ConfigError as error:
            parser.error(str(error))
        return
    torch.manual_seed(0)
    work = CeilingWork.on(device, DTYPES[args.dtype])
    rows: list[Row] = []
    for contest in chosen(choice, device):
        found, missing = measure(contest, device, work, args.repeats)
        print_results(found, missing, contest)
        rows += found
    if args.output:
        write([as_record(row, args.batch_size) for row in rows], details, args.output)


if __name__ == "__main__":
    main()
