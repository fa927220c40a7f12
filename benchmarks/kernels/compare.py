"""Compare the kernels of another git revision with those of the working tree, in the same contests.

Two processes (benchmarks.kernels.serve) that differ only in their kernels take turns: in each round one runs its
providers once while the other waits, so that other load on the machine falls on both. Every process gets its memory
at other addresses, which changes the time of small operations by tens of percent. So several pairs of processes are
compared, and a verdict needs all pairs to agree.
"""

from __future__ import annotations

import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.kernel_cases import Choice
from benchmarks.launch import ROOT
from fastjepa.errors import ConfigError

PAIRS = 5
_LEAST_DIFFERENCE = 0.03
"""Smaller differences are no verdict, as a share of the time before."""


@contextmanager
def kernels_of(revision: str, repository: Path = ROOT) -> Iterator[Path]:
    """Yield a temporary copy of the folder kernels/ of a revision. The repository is left as it is.

    Raises:
        ConfigError: `repository` is not a git checkout, it has no such revision, or the revision has no folder kernels/.
    """

    def git(*arguments: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(["git", "-C", str(repository), *arguments], capture_output=True, check=False)

    try:
        top = git("rev-parse", "--show-toplevel")
    except FileNotFoundError as error:
        raise ConfigError(f"--compare {revision}: git is not installed") from error
    if top.returncode or Path(top.stdout.decode().strip()).resolve() != repository.resolve():
        raise ConfigError(
            f"--compare {revision}: {repository} is not a git checkout, so there are no revisions to compare with"
        )
    commit = git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
    if commit.returncode:
        raise ConfigError(
            f"--compare {revision}: no such revision; expected a commit, branch or tag (git log --oneline)"
        )
    archive = git("archive", "--format=tar", commit.stdout.decode().strip(), "kernels")
    if archive.returncode:
        raise ConfigError(f"--compare {revision}: it has no folder kernels/: {archive.stderr.decode().strip()}")
    with tempfile.TemporaryDirectory(prefix="fastjepa_kernels_") as folder:
        with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
            files.extractall(folder, filter="data")
        yield Path(folder) / "kernels"


class _Side:
    """One process of a pair, which runs benchmarks.kernels.serve with the kernels in a given folder."""

    def __init__(self, name: str, kernels: Path, choice: Choice) -> None:
        self.name = name
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed by __exit__
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.kernels.serve", str(kernels), json.dumps(choice._asdict())],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def __enter__(self) -> _Side:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def send(self, line: str) -> None:
        assert self._process.stdin
        with suppress(BrokenPipeError):  # the process has ended: `receive` says why
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()

    def receive(self) -> dict[str, Any]:
        """The next answer of the process.

        Raises:
            ConfigError: the process has ended; with what it wrote to stderr.
        """
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._errors.seek(0)
            written = self._errors.read().strip()
            raise ConfigError(
                f"the contests cannot be run with the kernels of {self.name}; the process wrote:\n{written}"
            )
        answer: dict[str, Any] = json.loads(line)
        return answer


@dataclass(frozen=True)
class Comparison:
    """One provider in one contest: before (the other revision) and after (the working tree)."""

    contest: str
    provider: str
    before: float
    """Milliseconds, the median of all rounds of all pairs."""
    after: float
    ratios: tuple[float, ...]
    """The median after, divided by the median before, for each pair of processes."""

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)

    @property
    def verdict(self) -> str:
        """The direction of a difference that all pairs agree on and that exceeds the differences between them."""
        doubt = max(_LEAST_DIFFERENCE, max(self.ratios) - min(self.ratios))
        if max(self.ratios) < 1 and self.ratio < 1 - doubt:
            return "faster"
        if min(self.ratios) > 1 and self.ratio > 1 + doubt:
            return "SLOWER"
        return "no difference"

    def __str__(self) -> str:
        return (
            f"  {self.provider:<22}{self.before:>10.3f} ms ->{self.after:>10.3f} ms   x {self.ratio:.3f} "
            f"({min(self.ratios):.3f}-{max(self.ratios):.3f})   {self.verdict}"
        )


def compared(contest: str, provider: str, pairs: Sequence[tuple[Sequence[float], Sequence[float]]]) -> Comparison:
    """Compare the milliseconds of all rounds, given as (before, after) for each pair of processes."""
    before, after = (statistics.median([x for pair in pairs for x in pair[side]]) for side in (0, 1))
    ratios = tuple(statistics.median(b) / statistics.median(a) for a, b in pairs)
    return Comparison(contest, provider, before, after, ratios)


@dataclass
class _Pair:
    """Results of two processes, by (contest, provider)."""

    times: dict[tuple[str, str], tuple[list[float], list[float]]] = field(default_factory=dict)
    """Milliseconds of every round, before and after."""
    remarks: dict[tuple[str, str], str] = field(default_factory=dict)
    """The reasons why providers are not compared."""


def _turns(number: int) -> tuple[int, int]:
    """The order of the two sides in round `number`: each goes first every other time."""
    return (0, 1) if number % 2 == 0 else (1, 0)


def _run_pair(number: int, revision: str, kernels: Path, choice: Choice, rounds: int) -> _Pair:
    pair = _Pair()
    sides = {0: (revision, kernels), 1: ("the working tree", ROOT / "kernels")}
    with ExitStack() as stack:
        started = {which: stack.enter_context(_Side(*sides[which], choice)) for which in _turns(number)}
        old, new = started[0], started[1]
        while (contest := (there := old.receive())["contest"]) is not None:
            here = new.receive()
            for name in dict.fromkeys([*there["providers"], *there["missing"], *here["providers"], *here["missing"]]):
                if name in there["providers"] and name in here["providers"]:
                    pair.times[contest, name] = [], []
                    continue
                failures = [
                    f"{side.name}: {answer['missing'].get(name, 'it does not exist')}"
                    for side, answer in ((old, there), (new, here))
                    if name not in answer["providers"]
                ]
                pair.remarks[contest, name] = "; ".join(failures)
            for turn in range(number, number + rounds):
                for which in _turns(turn):
                    started[which].send("round")
                    for name, milliseconds in started[which].receive().items():
                        if (contest, name) in pair.times:
                            pair.times[contest, name][which].append(milliseconds)
            old.send("next")
            new.send("next")
    return pair


def compare(revision: str, choice: Choice, rounds: int, repository: Path = ROOT) -> tuple[list[Comparison], list[str]]:
    """Compare the kernels of a revision with those of the working tree.

    Args:
        revision: a commit, branch or tag.
        choice: selects the contests.
        rounds: how often each process runs its providers.
        repository: the git checkout that has the revision.

    Returns:
        The comparisons, and remarks on the providers that cannot be compared.

    Raises:
        ConfigError: there is no such revision, or the contests cannot be run with its kernels.
    """
    pairs = []
    with kernels_of(revision, repository) as kernels:
        for number in range(PAIRS):
            pairs.append(_run_pair(number, revision, kernels, choice, rounds))
            print(f"pair {number + 1} of {PAIRS} is done", flush=True)
    remarks = [f"{contest}: {name}: {remark}" for (contest, name), remark in pairs[0].remarks.items()]
    return [compared(*key, [pair.times[key] for pair in pairs]) for key in pairs[0].times], remarks


def print_comparison(comparisons: Sequence[Comparison], remarks: Sequence[str], revision: str) -> None:
    for contest, group in groupby(comparisons, key=lambda comparison: comparison.contest):
        print("\n".join(["", contest, *map(str, group)]))
    print("\n".join(["", *remarks]))
    verdicts = [comparison.verdict for comparison in comparisons]
    counts = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in ("faster", "SLOWER", "no difference"))
    mean = statistics.geometric_mean([comparison.ratio for comparison in comparisons] or [1.0])
    print(f"the working tree against {revision}: {counts}; geometric mean of the ratios {mean:.3f}")
    for comparison in comparisons:
        if comparison.verdict == "SLOWER":
            print(f"  SLOWER: {comparison.contest}: {comparison.provider}, x {comparison.ratio:.3f}")
