"""What a probe does to itself stays in its process, and is told."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from fastjepa.doctor import probes
from fastjepa.doctor.probes import Running, outcome_of
from tests.support.tiny_run import write_recipe


def test_a_probe_that_hangs_is_cut_off_with_all_that_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that waits for a pipe that nobody writes to, as for a dead file server."""
    os.mkfifo(tmp_path / "run.yaml")
    monkeypatch.setitem(probes.CUT_OFF, "kernels", 5)
    with Running("kernels", {"settings": (str(tmp_path / "run.yaml"), [])}) as probe:
        outcome = probe.outcome()
    assert outcome.failure == "did not end within 5 s, and was stopped"
    assert outcome.result == {}
    with pytest.raises(ProcessLookupError):
        os.killpg(probe.pid, 0)


def test_a_probe_that_runs_out_of_memory_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with Running("pytorch") as probe:
        os.kill(probe.pid, signal.SIGKILL)
        assert "when memory runs out" in str(probe.outcome().failure)
    with Running("pytorch") as probe:
        os.kill(probe.pid, signal.SIGSEGV)
        assert "by signal SIGSEGV" in str(probe.outcome().failure)


def test_what_a_probe_raises_is_its_last_line() -> None:
    outcome = outcome_of("kernels", {"settings": (None, ["optim.lrr=1"])})
    assert outcome.failure == "ended with status 1: command line: unknown key optim.lrr; did you mean optim.lr?"


def test_the_loader_is_measured_with_each_number_of_threads_and_bad_images_are_named(tmp_path: Path) -> None:
    config = write_recipe(tmp_path)
    damaged = tmp_path / "images" / "003.png"
    damaged.write_bytes(damaged.read_bytes()[:60])
    settings = (config, ["data.max_bad_share=0.5"])
    result = outcome_of("loader", {"settings": settings, "threads": [1, 2], "micro": 16, "seconds": 0.3}).result
    assert result["images"] == 70
    assert result["problem"] is None
    assert set(result["rates"]) == {"1", "2"}
    assert all(rate["images_per_second"] > 0 and rate["cpu_seconds"] > 0 for rate in result["rates"].values())
    (bad,) = result["bad"]
    assert bad.startswith("003.png: ")


def test_a_source_that_is_not_there_is_told_as_training_tells_it() -> None:
    arguments = {"settings": (None, ["data.source=/nowhere"]), "threads": [1], "micro": 8, "seconds": 0.1}
    result = outcome_of("loader", arguments).result
    assert result["problem"].startswith("data.source = /nowhere: No such file or folder; expected")


def test_ranks_that_send_to_one_another_are_measured() -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    result = outcome_of("link", {}, launcher).result
    assert result["bytes_per_second"] > 0
    assert 0 < result["latency"] < 1
