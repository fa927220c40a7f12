"""The process group: joining it, its timeouts, and errors of one rank, which are raised on all ranks."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store

from benchmarks.launch import free_port, launch
from fastjepa import distributed
from fastjepa.errors import ConfigError
from fastjepa.launch.environment import Launch


def test_a_network_interface_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(free_port()),
    }
    for name, value in {**alone, "GLOO_SOCKET_IFNAME": "ib7"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"could not connect to one another \(.*ib7.*\): GLOO_SOCKET_IFNAME"):
        distributed.init()


def test_a_host_that_gloo_cannot_reach_is_found_at_once_where_nccl_can(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in ranks.items():
        monkeypatch.setenv(name, value)

    def refused(**_: object) -> None:
        raise RuntimeError("Gloo connectFullMesh failed with [pair.cc:1] no error. Connection refused to 127.0.1.1")

    monkeypatch.setattr(distributed, "meet", lambda *_, **__: None)
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(dist, "new_group", refused)
    advice = (
        r"rank 1 on .* could not connect to one another .*: GLOO_SOCKET_IFNAME, and with GPUs NCCL_SOCKET_IFNAME too"
    )
    with pytest.raises(ConfigError, match=advice):
        distributed.init()


def test_a_watchdog_that_never_barks_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch could not hold twice its seconds."""
    ranks = {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(free_port()),
    }
    for name, value in ranks.items():
        monkeypatch.setenv(name, value)
    distributed.init()
    try:
        distributed.extend_timeouts(1e12)
        dist.all_reduce(torch.ones(1))
    finally:
        distributed.finish()


def test_the_threads_of_the_control_groups_are_let_go_of_where_nccl_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
    monkeypatch.setattr(time, "sleep", slept.append)
    distributed.wait_for_gloo()
    assert slept


@pytest.mark.parametrize(("local_rank", "gpus", "expected"), [(1, 4, 1), (3, 1, 0), (5, 4, 1)])
def test_a_rank_shows_the_others_which_gpu_it_takes(
    local_rank: int, gpus: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The only one where SLURM leaves each task one; one that another rank has where there are too few, to be told so."""
    ranks = {"RANK": "0", "WORLD_SIZE": "8", "LOCAL_RANK": str(local_rank), "MASTER_ADDR": "node1", "MASTER_PORT": "1"}
    for name, value in ranks.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(name="H100", uuid=f"gpu-{device.index}")
    )
    shown: dict[str, str] = {}

    def met(launch: Launch, facts: dict[str, str], seconds: float, **gpu: str) -> Store:
        shown.update(facts, **gpu)
        raise ConfigError("far enough")

    monkeypatch.setattr(distributed, "meet", met)
    with pytest.raises(ConfigError, match="far enough"):
        distributed.init({"torch": "2.13"})
    assert shown == {"torch": "2.13", "device": "cuda", "gpu": "H100", "gpu_id": f"gpu-{expected}"}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    folder = tmp_path_factory.mktemp("together")
    launch("tests.workers.together", 2, str(folder), timeout=100)
    found: dict[str, list[str]] = json.loads((folder / "results.json").read_text())
    return found


def test_the_first_error_is_raised_on_all_ranks_unchanged_on_its_own(results: dict[str, list[str]]) -> None:
    assert results["another type"] == ["FastjepaError: rank 1: KeyError: 'x'", "KeyError: 'x'"]
    assert results["two"] == ["OSError: disk", "FastjepaError: rank 0: disk"]


def test_heartbeats_that_cannot_be_written(results: dict[str, list[str]]) -> None:
    first, second = results["heartbeats"]
    assert first.startswith("RunFolderError: ")
    assert "cannot be written (Not a directory). Choose another output_dir" in first
    assert second == first.replace("RunFolderError: ", "RunFolderError: rank 0: ")


def test_reading_a_checkpoint(results: dict[str, list[str]]) -> None:
    assert results["load"] == ["FastjepaError: rank 1: MemoryError: none left", "MemoryError: none left"]


def test_writing_a_checkpoint(results: dict[str, list[str]]) -> None:
    first, second = results["write"]
    assert first == second
    assert first.startswith("CheckpointError: could not write checkpoint ")
    assert "step_00000002: rank 0: MemoryError: full. Older checkpoints are intact" in first
    assert results["left"] == ["step_00000001"]


def test_copying_the_state_for_a_save_in_the_background(results: dict[str, list[str]]) -> None:
    assert results["copy"] == ["FastjepaError: rank 1: MemoryError: no copy", "MemoryError: no copy"]


def test_starting_the_loader(results: dict[str, list[str]]) -> None:
    assert results["loader"] == ["FastjepaError: rank 1: RuntimeError: DALI", "RuntimeError: DALI"]
