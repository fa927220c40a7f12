"""Time how JPEG files become batches of 224 x 224 crops: python -m benchmarks.loader

fastjepa.data.Loader with each of its decoders stands beside a torch DataLoader with Pillow. All are checked, then timed in
turns in one run. The files lie in the page cache, so decoding is timed and not the disk. --soak and --step are other modes.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import itertools
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.loader.contestants import OURS, RIVAL, RIVALS, Ours, Rival, problem_with
from benchmarks.loader.photographs import QUALITY, Size, make_photographs
from benchmarks.loader.soak import soak
from benchmarks.loader.steps import compare_steps
from fastjepa.profiling.timing import summary


@dataclass
class Entry:
    """A contestant at one image size and number of threads (or workers), with its times per image in each round."""

    provider: str
    size: Size
    threads: int
    contestant: Ours | Rival
    images: int
    """Images of a turn."""
    ms: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)
    """CPU time of all threads of this process and of its workers."""

    def take_turn(self) -> None:
        started, cpu_started = time.perf_counter(), cpu_seconds()
        self.contestant.turn()
        self.ms.append(1e3 * (time.perf_counter() - started) / self.images)
        self.cpu_ms.append(1e3 * (cpu_seconds() - cpu_started) / self.images)


def cpu_seconds() -> float:
    """CPU time so far of all threads of this process and of its living workers (getrusage counts only ended ones)."""
    workers = [process.pid for process in multiprocessing.active_children() if process.pid]
    return time.process_time() + sum(
        time.clock_gettime(~pid << 3 | 2) for pid in workers
    )  # a process's clock: clock_getcpuclockid(3)


def enter(
    args: argparse.Namespace, folder: Path, device: torch.device, stack: ExitStack
) -> tuple[list[Entry], dict[str, str]]:
    """Open all contestants; return those with the right pixels, ready to be timed, and by name why the others are not."""
    missing = {name: problem for name in OURS if (problem := problem_with(name))}
    files = {}
    for size, count in zip(args.sizes, args.images, strict=True):
        files[size] = make_photographs(folder / _name(size), size, count)
        kilobytes = statistics.mean(path.stat().st_size for path in files[size]) / 1e3
        print(
            f"{count} JPEG files of {_name(size)}: {kilobytes:.0f} kB on average, quality {QUALITY}, in the page cache"
        )
    entries: list[Entry] = []
    # DataLoaders come first: their workers are forks, which must be made before the other contestants start threads.
    for provider in (*RIVALS, *OURS):
        for size, threads in [(size, threads) for size in args.sizes for threads in args.threads]:
            if provider in missing:
                continue
            kind = Ours if provider in OURS else Rival
            contestant = stack.enter_context(closing(kind(provider, files[size], args.batch_size, threads, device)))
            if isinstance(contestant, Ours) and (problem := contestant.problem()):
                missing[provider] = f"{_name(size)}: {problem}"
            contestant.turn()  # warm-up
            entries.append(Entry(provider, size, threads, contestant, len(files[size])))
    return [entry for entry in entries if entry.provider not in missing], missing


def as_records(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """The table: medians over the rounds with 20th and 80th percentiles; per size and threads, the cheapest first."""
    records = []
    rivals = {(entry.size, entry.threads): summary(entry.cpu_ms).p50 for entry in entries if entry.provider == RIVAL}
    order = list(rivals)
    for entry in sorted(entries, key=lambda e: (order.index((e.size, e.threads)), statistics.median(e.cpu_ms))):
        wall, cpu, contestant = summary(entry.ms), summary(entry.cpu_ms), entry.contestant
        records.append(
            {
                "image_size": _name(entry.size),
                "threads": entry.threads,
                "provider": entry.provider,
                "cpu_ms_per_image": cpu.p50,
                "cpu_ms_per_image_p20": cpu.p20,
                "cpu_ms_per_image_p80": cpu.p80,
                "dataloader_over_this": rivals[entry.size, entry.threads] / cpu.p50,
                "images_per_s": 1e3 / wall.p50,
                "images_per_s_p20": 1e3 / wall.p80,
                "images_per_s_p80": 1e3 / wall.p20,
                "masks_share": statistics.median(contestant.prepare_shares) if isinstance(contestant, Ours) else 0.0,
            }
        )
    return records


def print_table(records: Sequence[dict[str, Any]], missing: dict[str, str]) -> None:
    for (size, threads), group in itertools.groupby(records, key=lambda r: (r["image_size"], r["threads"])):
        print(f"\n{size}, threads or workers: {threads}")
        print(
            f"{'':33}{'CPU ms/image':>13}{'p20-p80':>13}{'DataLoader/this':>17}{'images/s':>10}{'p20-p80':>12}{'masks':>8}"
        )
        for r in group:
            cpu = f"{r['cpu_ms_per_image_p20']:.2f}-{r['cpu_ms_per_image_p80']:.2f}"
            rate = f"{r['images_per_s_p20']:.0f}-{r['images_per_s_p80']:.0f}"
            print(
                f"  {r['provider']:<31}{r['cpu_ms_per_image']:>13.2f}{cpu:>13}{r['dataloader_over_this']:>17.2f}"
                f"{r['images_per_s']:>10.0f}{rate:>12}{100 * r['masks_share']:>6.1f} %"
            )
    print(
        "\nDataLoader/this: ratio of CPU time per image. masks: share of a batch's preparation that samples its masks."
    )
    for name, reason in missing.items():
        print(f"not timed: {name}: {reason}")


def compare(args: argparse.Namespace, folder: Path, device: torch.device) -> None:
    """Time all contestants, print the table and write it to --output: the default mode."""
    details = environment(device) | {"batch": str(args.batch_size), "rounds": str(args.rounds)}
    print(", ".join(f"{key} {value}" for key, value in details.items()))
    with ExitStack() as stack:
        entries, missing = enter(args, folder, device, stack)
        for _ in range(args.rounds):
            for entry in entries:
                entry.take_turn()
    records = as_records(entries)
    print_table(records, missing)
    if args.output:
        from benchmarks.loader.plot import plot

        args.output.mkdir(parents=True, exist_ok=True)
        with (args.output / "loader.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [*records[0], *details])
            writer.writeheader()
            writer.writerows(record | details for record in records)
        plot(records, details, args.output / "loader.png")


def environment(device: torch.device) -> dict[str, str]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    versions = {d.name.lower(): d.version for d in importlib.metadata.distributions()}
    packages = ("torch", "pillow", "simplejpeg", *(name for name in versions if name.startswith("nvidia-dali")))
    return {"device": name, "cores": str(os.cpu_count())} | {name: versions[name] for name in packages}


def _name(size: Size) -> str:
    return f"{size[0]}x{size[1]}"


def _size(text: str) -> Size:
    width, height = map(int, text.split("x"))
    return width, height


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.loader", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", type=_size, default=[(500, 375), (2000, 1500)], help="WIDTHxHEIGHT")
    parser.add_argument(
        "--images", nargs="+", type=int, default=[256, 64], help="files of each size; a turn reads them all"
    )
    parser.add_argument(
        "--threads",
        nargs="+",
        type=int,
        default=[1, 2],
        help="numbers of data.num_threads, and of the DataLoader's workers",
    )
    parser.add_argument("--batch_size", type=int, help="images (default: 32, with --step 8)")
    parser.add_argument("--rounds", type=int, default=9, help="timed turns of each, 2 or more (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="also write loader.csv and loader.png into this folder")
    parser.add_argument("--soak", type=int, metavar="N", help="instead print the memory over N batches of small images")
    parser.add_argument(
        "--step", metavar="MODEL", help="instead time training steps of MODEL on real and on synthetic images"
    )
    args = parser.parse_args(argv)
    args.batch_size = args.batch_size or (8 if args.step else 32)
    if args.rounds < 2:
        parser.error(f"--rounds {args.rounds}: expected 2 or more, for percentiles")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "images"
        if args.soak:
            soak(folder, args.soak, args.batch_size, max(args.threads), device)
        elif args.step:
            compare_steps(folder, args.step, args.batch_size, max(args.threads), args.rounds, device)
        elif len(args.images) != len(args.sizes) or any(count % args.batch_size for count in args.images):
            parser.error("--images: expected a multiple of --batch_size for each of --sizes")
        else:
            compare(args, folder, device)


if __name__ == "__main__":
    main()
