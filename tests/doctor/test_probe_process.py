"""Whatever a probe does to itself stays in its process, and is reported."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from fastjepa.doctor.probe_process import PROBES, ProbeProcess, run_probe


@pytest.mark.processes
def test_a_probe_that_hangs_is_killed_with_all_processes_that_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits for a pipe that nobody writes to, as one would wait for a dead file server."""
    os.mkfifo(tmp_path / "run.yaml")
    monkeypatch.setitem(PROBES, "kernels", PROBES["kernels"]._replace(seconds=5))
    with ProbeProcess("kernels", {"settings": (str(tmp_path / "run.yaml"), [])}) as probe:
        outcome = probe.outcome()
    assert outcome.failure == "did not end within 5 s, and was stopped"
    assert outcome.result == {}
    with pytest.raises(ProcessLookupError):
        os.killpg(probe.pid, 0)


@pytest.mark.processes
def test_a_probe_that_is_killed_or_crashes_is_reported_with_its_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    with ProbeProcess("pytorch") as probe:
        os.kill(probe.pid, signal.SIGKILL)
        assert "when memory runs out" in str(probe.outcome().failure)
    with ProbeProcess("pytorch") as probe:
        os.kill(probe.pid, signal.SIGSEGV)
        assert "by signal SIGSEGV" in str(probe.outcome().failure)


@pytest.mark.processes
def test_an_error_of_a_probe_is_reported_as_its_last_line() -> None:
    outcome = run_probe("kernels", {"settings": (None, ["optim.lrr=1"])})
    assert outcome.failure == "ended with status 1: command line: unknown key optim.lrr; did you mean optim.lr?"


def test_threads_of_a_probe_wait_as_those_of_training_do(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **options: started.append(options["env"]))
    ProbeProcess("pytorch")
    assert started[0]["OMP_WAIT_POLICY"] == "PASSIVE"
    assert "OMP_WAIT_POLICY" not in os.environ
