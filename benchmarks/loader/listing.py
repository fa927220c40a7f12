"""Time and memory of opening a data set of many files, listed anew and from the cache.

python -m benchmarks.loader.listing [--files N]

Makes N empty images in class folders, and a text file that lists as many, in a temporary folder that is deleted at the end.
Each data set is opened in a process of its own; memory is the peak above what the imports take. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_PER_FOLDER = 1000
_HOUR = 3600.0


def make_folder(folder: Path, count: int) -> Path:
    """Make `count` empty images, a thousand in each class folder."""
    for first in range(0, count, _PER_FOLDER):
        path = folder / f"n{first // _PER_FOLDER:08d}"
        path.mkdir(parents=True)
        for number in range(first, min(first + _PER_FOLDER, count)):
            os.close(os.open(f"{path}/{path.name}_{number % _PER_FOLDER:08d}.jpg", os.O_CREAT | os.O_WRONLY))
        _age(path)
    _age(folder)
    return folder


def make_list(file: Path, count: int) -> Path:
    """Write a list of `count` images (which do not exist) with their labels."""
    with file.open("w", encoding="utf-8") as text:
        for number in range(count):
            name = f"n{number // _PER_FOLDER:08d}"
            text.write(f"{name}/{name}_{number % _PER_FOLDER:08d}.jpg\t{name}\n")
    _age(file)
    return file


def _age(path: Path) -> None:
    """Date a path back by an hour: fastjepa.data.sources.index lists again what has changed just now."""
    os.utime(path, (time.time() - _HOUR,) * 2)


def measure(source: str) -> dict[str, float]:
    """Open a data set in this process: images, seconds, peak memory in MiB."""
    from fastjepa.config import DataConfig
    from fastjepa.data.sources import open_dataset

    Path("/proc/self/clear_refs").write_text("5")  # starts a new peak
    before = _status("VmRSS")
    started = time.perf_counter()
    dataset = open_dataset(DataConfig(source=source), "train")
    seconds = time.perf_counter() - started
    assert dataset is not None
    return {"images": len(dataset), "seconds": seconds, "mebibytes": (_status("VmHWM") - before) / 1024}


def _status(key: str) -> int:
    """A figure of this process's status, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.loader.listing",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--files", type=int, default=1_000_000, help="images of each data set (default: %(default)s)")
    parser.add_argument("--folder", help="folder in which the temporary folder is made (default: the system's)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.child)))
        return
    print(f"{'source':<8}{'images':>10}{'':>14}{'seconds':>9}{'MiB at peak':>13}{'index MB':>10}")
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="fastjepa-index-") as temporary:
        root = Path(temporary)
        for name, make in (("folder", make_folder), ("list", make_list)):
            source = make(root / name, args.files)
            environment = {**os.environ, "FASTJEPA_CACHE": str(root / f"{name}-cache")}
            for how in ("listed", "from cache"):
                command = [sys.executable, "-m", "benchmarks.loader.listing", "--child", str(source)]
                output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
                row = json.loads(output)
                megabytes = sum(file.stat().st_size for file in (root / f"{name}-cache").rglob("*.*")) / 1e6
                print(
                    f"{name:<8}{row['images']:>10,}{how:>14}{row['seconds']:>9.2f}{row['mebibytes']:>13.1f}{megabytes:>10.1f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
