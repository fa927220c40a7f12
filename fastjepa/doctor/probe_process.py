"""Runs a probe in a process of its own, so that one which crashes, hangs or runs out of memory is stopped and reported.

A probe is a function of `probe_installation` or `probe_run`. Its keyword arguments and its result are JSON; it is run as
`python -m fastjepa.doctor.probe_process NAME ARGUMENTS`.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from fastjepa.doctor import probe_installation, probe_run
from fastjepa.errors import FastjepaError
from fastjepa.launch.openmp import set_wait_policy

_MARK = "fastjepa-probe: "  # begins the line of the result: libraries print lines of their own


class Probe(NamedTuple):
    function: Callable[..., dict[str, Any]]
    seconds: float
    """Seconds after which it is stopped. Most probes take a few; the first time on a GPU, kernels are compiled."""


PROBES = {
    "pytorch": Probe(probe_installation.pytorch, 60),
    "deepspeed": Probe(probe_installation.deepspeed, 60),
    "dali": Probe(probe_installation.dali, 90),
    "apex": Probe(probe_installation.apex, 60),
    "kernels": Probe(probe_installation.kernels, 400),
    "loader": Probe(probe_run.loader, 120),
    "step": Probe(probe_run.step, 400),
    "link": Probe(probe_run.link, 60),
}


@dataclass(frozen=True)
class Outcome:
    """The result of a probe, or why there is none."""

    result: dict[str, Any]
    failure: str | None = None
    """What happened to the probe, to be read after its subject: "did not end within 60 s, and was stopped"."""


class ProbeProcess:
    """The process of a probe. Leaving the context kills it, with all processes that it started."""

    def __init__(self, name: str, arguments: dict[str, Any] | None = None, launcher: Sequence[str] = ()) -> None:
        """
        Args:
            name: a key of PROBES.
            arguments: keyword arguments of the probe.
            launcher: words that stand between python and the module, such as those of torchrun.
        """
        environment = dict(os.environ)
        set_wait_policy(environment)  # as train.py does, so that what is measured is what training reaches
        self._seconds = PROBES[name].seconds
        self._deadline = time.monotonic() + self._seconds
        self._output = tempfile.TemporaryFile()  # noqa: SIM115  # closed by __exit__
        self._process = subprocess.Popen(
            [sys.executable, *launcher, "-m", "fastjepa.doctor.probe_process", name, json.dumps(arguments or {})],
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a process group of its own, which __exit__ kills
            env=environment,
        )

    @property
    def pid(self) -> int:
        """The id of the process, and of the group of all processes that it starts."""
        return self._process.pid

    def __enter__(self) -> ProbeProcess:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        self._output.close()

    def outcome(self) -> Outcome:
        """Wait until the probe ends or its time is over."""
        try:
            status = self._process.wait(max(0.0, self._deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            return Outcome({}, f"did not end within {self._seconds:g} s, and was stopped")
        self._output.seek(0)
        lines = self._output.read().decode(errors="replace").splitlines()
        for line in reversed(lines):
            if line.startswith(_MARK):
                return Outcome(json.loads(line.removeprefix(_MARK)))
        if status == -signal.SIGKILL:
            return Outcome({}, "was killed, as Linux does with a process when memory runs out")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")
        how = f"by signal {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
        return Outcome({}, f"ended {how}: {last}")


def run_probe(name: str, arguments: dict[str, Any], launcher: Sequence[str] = ()) -> Outcome:
    """Start a probe and wait for it; the arguments are those of `ProbeProcess`."""
    with ProbeProcess(name, arguments, launcher) as probe:
        return probe.outcome()


def print_progress(activity: str) -> None:
    """Tell the user, on stderr, which activity takes the next seconds."""
    print(f"{activity} ...", file=sys.stderr, flush=True)


def main() -> None:
    """Run one probe in this process, and print its result as the line that `ProbeProcess` looks for."""
    name, arguments = sys.argv[1], json.loads(sys.argv[2])
    try:
        result = PROBES[name].function(**arguments)
    except FastjepaError as error:
        sys.exit(str(error))
    if result:  # of several ranks, only the first has one
        print(_MARK + json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
