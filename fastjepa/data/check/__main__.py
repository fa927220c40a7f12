"""python -m fastjepa.data.check SOURCE: look at every image of a data set before a run does, and report what is there.

Every image is decoded completely: nothing less finds all damage. With --headers the files are read, but no pixels are
decoded. An image is bad if `Reader` or `CPUDecoder` calls it bad: the check runs their code. All figures in the report are
of usable images.

Exit status: 0: no image is bad; 1: some are; 2: an error; 130: stopped with Ctrl-C, after a report of what was seen.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from fastjepa.config import DataConfig
from fastjepa.data.check.scan import SPLITS, scan_source
from fastjepa.data.check.summary import format_report
from fastjepa.errors import DataError, FastjepaError


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m fastjepa.data.check",
        description="Look at every image of a data set before a run does: counts, classes, formats, sizes, duplicates, "
        "and every bad image with the reason.",
        epilog="Exit status: 0: no image is bad; 1: some are; 2: an error; 130: stopped with Ctrl-C, after a report of "
        "what was seen.",
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parser.add_argument(
        "source", help="what data.source takes: a folder, tar shards, tables, a list of files, or fashion_mnist"
    )
    parser.add_argument(
        "--split", choices=SPLITS, help="check this split only (default: both, and the images that they share)"
    )
    parser.add_argument(
        "--headers", action="store_true", help="read the files, but decode no pixels: faster, finds less"
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the report to FILE, too, with more names")
    parser.add_argument(
        "--num_threads", type=int, default=cores, help="threads (default: %(default)s, one for each core)"
    )
    parser.add_argument(
        "--max_pixels",
        type=int,
        default=DataConfig.max_pixels,
        help="call larger images bad, as data.max_pixels does (default: %(default)s)",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    warnings.filterwarnings("ignore", module=r"PIL\.")  # about single files; they would break up the progress bar
    try:
        config = DataConfig(num_threads=args.num_threads, max_pixels=args.max_pixels)
        if args.json:
            _write(args.json, "", "a")  # an error comes now, and not after hours
        splits = (args.split,) if args.split else SPLITS
        report = scan_source(args.source, splits, config, headers_only=args.headers)
        print(format_report(report), flush=True)
        if args.json:
            _write(args.json, json.dumps(report, indent=2) + "\n", "w")
    except FastjepaError as error:
        print(f"fastjepa: error: {error}", file=sys.stderr)
        return 2
    if not report["complete"]:
        return 130
    return 1 if any(split["bad"] for split in report["splits"].values()) else 0


def _write(path: Path, text: str, mode: Literal["a", "w"]) -> None:
    try:
        with path.open(mode, encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise DataError(f"--json {path}: cannot be written ({error.strerror})") from error


if __name__ == "__main__":
    sys.exit(main())
