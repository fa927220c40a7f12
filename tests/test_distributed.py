"""The process group: joining it, its timeouts, and errors of one rank, which are raised on all ranks."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store

from benchmarks.launch import free_port, launch
from fastjepa import distributed
from fastjepa.errors import ConfigError, DataError
from fastjepa.launch.environment import Launch


def set_launch(monkeypatch: pytest.MonkeyPatch, rank: int = 0, world_size: int = 1, **variables: str) -> None:
    """Set the variables of a launcher."""
    launcher = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    launcher |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
    for name, value in (launcher | variables).items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process is a run of one rank."""
    set_launch(monkeypatch)
    distributed.init()
    yield
    distributed.finish()


def test_a_network_interface_that_does_not_exist_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    set_launch(monkeypatch, GLOO_SOCKET_IFNAME="ib7")
    with pytest.raises(ConfigError, match=r"could not connect to one another \(.*ib7.*\): GLOO_SOCKET_IFNAME"):
        distributed.init()


def test_a_host_that_only_nccl_can_reach_is_refused_when_the_run_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    set_launch(monkeypatch, 1, 2)

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


def test_an_error_that_is_no_lost_contact_keeps_its_type(monkeypatch: pytest.MonkeyPatch) -> None:
    set_launch(monkeypatch)

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(distributed, "meet", lambda *_, **__: None)
    monkeypatch.setattr(dist, "init_process_group", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        distributed.init()


@pytest.mark.parametrize(("local_rank", "gpus", "expected"), [(1, 4, 1), (3, 1, 0), (5, 4, 1)])
def test_a_rank_tells_the_others_which_gpu_it_takes(
    local_rank: int, gpus: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes its own GPU, or the only one that SLURM shows it, or the GPU of another rank, which is then refused."""
    set_launch(monkeypatch, 0, 8, LOCAL_RANK=str(local_rank))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(name="H100", uuid=f"gpu-{device.index}")
    )
    shown: dict[str, str] = {}

    def meet(launch: Launch, facts: dict[str, str], seconds: float, **gpu: str) -> Store:
        shown.update(facts, **gpu)
        raise ConfigError("far enough")

    monkeypatch.setattr(distributed, "meet", meet)
    with pytest.raises(ConfigError, match="far enough"):
        distributed.init({"torch": "2.13"})
    assert shown == {"torch": "2.13", "device": "cuda", "gpu": "H100", "gpu_id": f"gpu-{expected}"}


@pytest.mark.parametrize(("ranks_here", "given", "expected"), [(3, None, 2), (16, None, 1), (3, "7", 8), (1, None, 8)])
def test_ranks_on_cpus_share_the_cores_unless_the_user_says_otherwise(
    ranks_here: int, given: str | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_launch(monkeypatch, 0, ranks_here, LOCAL_WORLD_SIZE=str(ranks_here))
    monkeypatch.delenv("OMP_NUM_THREADS")
    if given is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    threads = [8]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(distributed, "_init_process_group", lambda *_: None)
    assert distributed.init() == torch.device("cpu")
    assert threads[-1] == expected


@pytest.mark.usefixtures("joined")
def test_timeouts_are_twice_the_watchdogs_within_what_torch_can_hold() -> None:
    def timeouts() -> set[float]:
        groups = dist.distributed_c10d._world.pg_map
        backends = [group._get_backend(torch.device("cpu")) for group in groups]
        return {backend.options._timeout.total_seconds() for backend in backends}

    assert timeouts() == {distributed.COLLECTIVE_TIMEOUT}
    distributed.extend_timeouts(5000.0)
    assert timeouts() == {10_000.0}
    distributed.extend_timeouts(1e12)  # a user's way to turn the watchdog off; torch counts nanoseconds in 64 bits
    assert timeouts() == {1e9}
    dist.all_reduce(torch.ones(1))


@pytest.mark.usefixtures("joined")
def test_finish_leaves_no_group_to_a_second_run_in_this_process() -> None:
    distributed.finish()
    assert not distributed._control_groups
    assert (distributed.rank(), distributed.world_size(), distributed.control_group("checkpoints")) == (0, 1, None)
    distributed.init_single_process_group()
    assert distributed.world_size() == 1


def test_gloo_is_waited_for_where_nccl_trains_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control groups are gloo's in every run."""
    slept: list[float] = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
    monkeypatch.setattr(time, "sleep", slept.append)
    distributed.wait_for_gloo()
    assert slept


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("[enforce fail at a/pair.cc:1] rv != -1. -1 vs 0. Connection reset by peer. Try again", "-1 vs 0"),
        (
            "[../gloo/pair.cc:538] Connection closed by peer [127.0.0.1]:1\nmore",
            "Connection closed by peer [127.0.0.1]:1",
        ),
        ("Broken pipe. This may be because the remote end is gone", "Broken pipe"),
    ],
)
def test_the_reason_of_a_lost_contact_has_no_source_line_and_no_advice(message: str, reason: str) -> None:
    assert distributed.reason_of(RuntimeError(message)) == reason


def test_lost_contact_is_told_from_other_errors() -> None:
    assert distributed.is_lost_contact(dist.DistNetworkError("reset"))
    assert distributed.is_lost_contact(RuntimeError("[Gloo] closed"))
    assert not distributed.is_lost_contact(RuntimeError("out of memory"))


def test_a_rank_raises_its_own_error_and_the_first_rank_with_one_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    def raised(errors: list[Exception | None], rank: int) -> Exception:
        monkeypatch.setattr(distributed, "rank", lambda: rank)
        monkeypatch.setattr(distributed, "gather_objects", lambda known, _group=None: [errors[0], known, *errors[2:]])
        with pytest.raises(Exception) as found:  # noqa: PT011
            distributed.raise_together(errors[rank])
        return found.value

    own = DataError("torn")
    assert raised([None, own, DataError("late")], rank=1) is own
    other = raised([DataError("early"), own, None], rank=1)
    assert (type(other), str(other)) == (DataError, "rank 0: early")


@pytest.fixture(scope="module")
def raised(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What each of two ranks raised in every case of the worker, where one of them failed between collectives."""
    folder = tmp_path_factory.mktemp("shared_errors")
    launch("tests.workers.shared_errors", 2, str(folder), timeout=100)
    found: dict[str, list[str]] = json.loads((folder / "results.json").read_text())
    return found


@pytest.mark.processes
def test_the_first_error_is_raised_on_all_ranks_unchanged_on_its_own(raised: dict[str, list[str]]) -> None:
    assert raised["another type"] == ["FastjepaError: rank 1: KeyError: 'x'", "KeyError: 'x'"]
    assert raised["two"] == ["OSError: disk", "FastjepaError: rank 0: disk"]


@pytest.mark.processes
def test_heartbeats_that_cannot_be_written_are_an_error_on_all_ranks(raised: dict[str, list[str]]) -> None:
    first, second = raised["heartbeats"]
    assert first.startswith("RunFolderError: ")
    assert "cannot be written (Not a directory). Choose another output_dir" in first
    assert second == first.replace("RunFolderError: ", "RunFolderError: rank 0: ")


@pytest.mark.processes
def test_a_checkpoint_that_one_rank_cannot_read_is_an_error_on_all_ranks(raised: dict[str, list[str]]) -> None:
    assert raised["load"] == ["FastjepaError: rank 1: MemoryError: none left", "MemoryError: none left"]


@pytest.mark.processes
def test_a_checkpoint_that_one_rank_cannot_write_is_an_error_on_all_ranks(raised: dict[str, list[str]]) -> None:
    first, second = raised["write"]
    assert first == second
    assert first.startswith("CheckpointError: could not write checkpoint ")
    assert "step_00000002: rank 0: MemoryError: full. Older checkpoints are intact" in first
    assert raised["left"] == ["step_00000001"]


@pytest.mark.processes
def test_a_state_that_one_rank_cannot_copy_for_a_save_is_an_error_on_all_ranks(raised: dict[str, list[str]]) -> None:
    assert raised["copy"] == ["FastjepaError: rank 1: MemoryError: no copy", "MemoryError: no copy"]


@pytest.mark.processes
def test_a_loader_that_one_rank_cannot_start_is_an_error_on_all_ranks(raised: dict[str, list[str]]) -> None:
    assert raised["loader"] == ["FastjepaError: rank 1: RuntimeError: DALI", "RuntimeError: DALI"]
