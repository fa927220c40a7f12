"""The probes of the run: loader, step and link."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastjepa.doctor import probe_run
from fastjepa.doctor.probe_installation import Settings
from fastjepa.doctor.probe_process import run_probe
from tests.support.tiny_run import write_recipe


@pytest.mark.processes
def test_the_loader_is_measured_with_each_number_of_threads_and_names_bad_images(tmp_path: Path) -> None:
    config = write_recipe(tmp_path)
    damaged = tmp_path / "images" / "003.png"
    damaged.write_bytes(damaged.read_bytes()[:60])
    settings = (config, ["data.max_bad_share=0.5"])
    result = run_probe("loader", {"settings": settings, "threads": [1, 2], "micro": 16, "seconds": 0.3}).result
    assert result["images"] == 70
    assert result["problem"] is None
    assert set(result["rates"]) == {"1", "2"}
    assert all(rate["images_per_second"] > 0 and rate["cpu_seconds"] > 0 for rate in result["rates"].values())
    (bad,) = result["bad"]
    assert bad.startswith("003.png: ")


@pytest.mark.processes
def test_a_missing_source_is_reported_as_training_reports_it() -> None:
    arguments = {"settings": (None, ["data.source=/nowhere"]), "threads": [1], "micro": 8, "seconds": 0.1}
    result = run_probe("loader", arguments).result
    assert result["problem"].startswith("data.source = /nowhere: No such file or folder; expected")


@pytest.mark.processes
def test_the_link_between_two_ranks_is_measured() -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    result = run_probe("link", {}, launcher).result
    assert result["bytes_per_second"] > 0
    assert 0 < result["latency"] < 1


def test_the_step_is_measured_alone_and_with_the_loader(tmp_path: Path) -> None:
    settings: Settings = (write_recipe(tmp_path), [])
    result = probe_run.step(settings, sizes=[8], threads=1, seconds=0.05, with_loader=True)
    rate = result["rates"]["8"]
    assert all(rate[name] > 0 for name in ("images_per_second", "cpu_seconds", "mfu", "peak_bytes"))
    together = result["with_loader"]
    assert 0 < together["images_per_second"] <= rate["images_per_second"]
    assert 0 <= together["data_wait"] < 1
    assert result["estimated_images_per_second"] > 0
