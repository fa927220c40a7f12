"""Refuses files that do not belong into the repository: large ones, and text that names a folder of somebody's machine.

python .ci/check_files.py [FILE ...]    without FILE: every file that git tracks
"""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

LARGEST = 1024  # KiB
LARGE_FILES = {"fastjepa/data/embedded/fashion_mnist_10k.bin.xz"}
# A home folder, or a file in the folder for temporary ones; not the end of another path, such as {folder}/home/x.
PRIVATE = re.compile(rb"(?<![\w.~)}\]-])/(?:(?:home|Users|tmp)/\w[^\s\"'`)]*|root\b(?!\\)[^\s\"'`)]*)")


def problems(path: Path) -> Iterator[str]:
    content = path.read_bytes()
    if len(content) > LARGEST * 1024 and path.as_posix() not in LARGE_FILES:
        yield f"{path}: {len(content) // 1024:,} KiB: expected at most {LARGEST:,} KiB"
    if b"\0" in content:  # not text
        return
    for number, line in enumerate(content.split(b"\n"), start=1):
        for found in PRIVATE.findall(line):
            path_found = found.decode(errors="replace")
            yield f"{path}, line {number}: {path_found}: a path of one machine: expected /path/to/... or a relative one"


def tracked() -> list[str]:
    command = ["git", "ls-files", "-z"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\0")[:-1]


def main(names: list[str]) -> int:
    if not names and not Path(".git").exists():
        print("check_files: skipped, because this is not a clone: git does not know its files")
        return 0
    found = [problem for name in names or tracked() if Path(name).is_file() for problem in problems(Path(name))]
    print("\n".join(found), end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
