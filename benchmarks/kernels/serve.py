"""One process of benchmarks.kernels --compare: runs the contests of the kernels in a given folder, a round when asked.

benchmarks.kernels.compare starts it as `python -m benchmarks.kernels.serve KERNELS CHOICE`. Only the contests import
the kernels in that folder. The code that measures and that samples the masks keeps those of the working tree, so that
kernels can be older than the rest of the repository.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks.kernel_cases import Choice
from fastjepa.profiling.timing import sample_in_turns

if TYPE_CHECKING:
    from benchmarks.kernels.contest import Contest

_WARMUP = 3


def contests_of(kernels: Path, choice: Choice, device: torch.device) -> Iterator[Contest]:
    """The contests, with fastjepa_kernels imported anew from the folder `kernels`.

    Raises:
        ImportError: the folder lacks what the contests need.
    """

    def imported() -> list[str]:
        return [name for name in sys.modules if name.partition(".")[0] == "fastjepa_kernels"]

    for name in imported():
        del sys.modules[name]
    sys.path.insert(0, str(kernels))
    contests: Iterator[Contest] = import_module("benchmarks.kernels.contests").chosen(choice, device)
    for name in imported():
        file = Path(str(sys.modules[name].__file__))
        if not file.is_relative_to(kernels):  # the finder of an editable installation fills gaps
            raise ImportError(f"{kernels} has no {name}: it was found in {file}")
    return contests


def main() -> None:
    channel = os.fdopen(os.dup(sys.stdout.fileno()), "w")  # for answers, a JSON object a line
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print goes to stderr

    def send(answer: object) -> None:
        print(json.dumps(answer), file=channel, flush=True)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    contests = contests_of(Path(sys.argv[1]), Choice(**json.loads(sys.argv[2])), device)
    torch.manual_seed(0)
    for contest in contests:
        present, missing = contest.contestants(ours_only=True)
        sample_in_turns(present, device, _WARMUP)
        send({"contest": contest.title, "providers": list(present), "missing": missing})
        while sys.stdin.readline() == "round\n":
            send({name: times[0] for name, times in sample_in_turns(present, device, 1).items()})
    send({"contest": None})


if __name__ == "__main__":
    main()
