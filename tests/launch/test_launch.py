"""How a run is started: SLURM's variables, ranks that meet or say why not, and one plain line on every rank."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store, TCPStore

from benchmarks.launch import ROOT, free_port
from fastjepa import distributed
from fastjepa.checkpoint.format import latest, step_of
from fastjepa.config.batch_sizes import BatchSizes
from fastjepa.engine import deepspeed_patches
from fastjepa.errors import ConfigError, RunFolderError
from fastjepa.launch import rendezvous
from fastjepa.launch.environment import Launch, first_host, read_launch, tasks_per_node
from fastjepa.launch.rendezvous import Card, _contradiction, _ranks, meet
from fastjepa.run.folder import RunFolder
from fastjepa.run.watchdog import EXIT_STATUS
from fastjepa.train import main
from tests.support.reliability import Record
from tests.support.small import small_config
from tests.support.tiny_run import at_step, ended, start, write_recipe

DEBUG = ["--config", str(ROOT / "configs" / "debug.yaml")]
SLURM = {
    "SLURM_JOB_ID": "1234567",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "20",
    "SLURM_STEP_NUM_TASKS": "20",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2),4",
    "SLURM_STEP_NODELIST": "node[003-005]",
    "SLURM_NODEID": "2",
    "SLURM_PROCID": "17",
    "SLURM_LOCALID": "1",
}


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node003", "node003"),
        ("node[003-005,7]", "node003"),
        ("login1,node[3-4]", "login1"),
        ("rack[0-1]n[08,9]-ib,x", "rack0n08-ib"),
        ("gpu-a.site.org,gpu-b", "gpu-a.site.org"),
    ],
)
def test_the_first_host_of_a_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_tasks_per_node() -> None:
    assert tasks_per_node("8(x2),4") == [8, 8, 4]
    with pytest.raises(ConfigError, match=r"SLURM_STEP_TASKS_PER_NODE = 8\*2"):
        tasks_per_node("8*2")


def test_a_task_of_srun_is_a_rank_and_the_variables_are_there_for_deepspeed() -> None:
    environment = dict(SLURM)
    launch = read_launch(environment)
    assert launch == Launch(17, 20, 1, 4, "node003", 10_000 + 1234567 % 20_000)
    given = {
        name: environment[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
    }
    assert list(given.values()) == ["17", "20", "1", "4", "node003"]
    assert read_launch({**SLURM, "MASTER_PORT": "77", "MASTER_ADDR": "ib3"}) == Launch(17, 20, 1, 4, "ib3", 77)


def test_a_process_in_an_allocation_that_srun_did_not_start_is_alone() -> None:
    """Else it would wait for ranks that nobody starts. sbatch sets SLURM_PROCID in its script too."""
    shell = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "16", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
    assert read_launch(shell) is None
    assert read_launch({**SLURM, "SLURM_STEP_NUM_TASKS": "1"}) is None
    assert read_launch({}) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"RANK": "2"}, "RANK = 2: expected less than WORLD_SIZE = 2"),
        ({"RANK": "one"}, "RANK = 'one' in the environment: expected a number"),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE = '-2'"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT = 99999: expected 1 to 65535"),
        ({"MASTER_ADDR": ""}, "RANK is set but MASTER_ADDR not"),
    ],
)
def test_variables_that_cannot_be_right_are_named(changes: dict[str, str], message: str) -> None:
    good = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    assert read_launch(good) is not None
    with pytest.raises(ConfigError) as error:
        read_launch({**good, **changes})
    assert message in str(error.value)


def test_what_differs_is_named_with_its_ranks_and_hosts() -> None:
    cards = [Card(r, 4, "ab"[r // 2], {"torch": "2.13" if r < 2 else "2.12", "seed": "0"}) for r in range(4)]
    assert _contradiction(cards[:2]) is None
    other = {"rank": 2, "world_size": 4, "host": "b", "facts": {"torch": "2.12", "seed": "0"}, "of a later version": 1}
    cards[2] = Card.read(json.dumps(other).encode())
    problem = _contradiction(cards)
    assert problem is not None
    assert "torch: 2.13 on ranks 0-1 (a), 2.12 on ranks 2-3 (b)" in problem
    assert "seed" not in problem
    assert _ranks([5, 1, 2, 0]) == "ranks 0-2, 5"


def environment(**variables: str) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return {**os.environ, "PYTHONPATH": path, **variables}


class Rank(NamedTuple):
    rank: int
    world_size: int
    torch: str = "2.13"
    gpu: str = ""
    host: str = "node1"
    master_addr: str = "127.0.0.1"


def meeting(ranks: Sequence[Rank], port: int, seconds: float = 30.0) -> list[Store | str]:
    """What each rank gets: the store, or the line that its user reads. Threads take the place of processes and hosts."""
    here = threading.local()

    def one(rank: Rank) -> Store | str:
        here.host = rank.host
        launch = Launch(rank.rank, rank.world_size, rank.rank, rank.world_size, rank.master_addr, port)
        try:
            return meet(launch, {"torch": rank.torch}, seconds, gpu_id=rank.gpu)
        except ConfigError as error:
            return str(error)

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(len(ranks)) as pool:
        patch.setattr(socket, "gethostname", lambda: here.host)
        patch.setattr(rendezvous, "POLL_SECONDS", 0.01)
        return list(pool.map(one, ranks))


def test_ranks_that_are_alike_meet() -> None:
    stores = meeting([Rank(0, 2, gpu="a"), Rank(1, 2, gpu="b")], free_port())
    assert not any(isinstance(store, str) for store in stores), stores


@pytest.mark.parametrize(
    ("fault", "ranks", "message"),
    [
        (
            "a rank of two with another version of torch",
            [Rank(0, 2), Rank(1, 2, torch="2.12", host="node2")],
            "the ranks are not alike: torch: 2.13 on rank 0 (node1), 2.12 on rank 1 (node2). Expected the same everywhere",
        ),
        (
            "ranks with different WORLD_SIZE",
            [Rank(0, 2), Rank(1, 3, host="node2"), Rank(2, 3, host="node2")],
            "the ranks were started with different WORLD_SIZE: 2 on rank 0 (node1), 3 on ranks 1-2 (node2)",
        ),
        (
            "a rank that is started twice",
            [Rank(0, 3), Rank(1, 3, host="node2"), Rank(1, 3, host="node2")],
            "rank 1 was started more than once (on node2, node2): give every machine its own --node_rank, and every run "
            "its own port (--master_port)",
        ),
        (
            "three ranks on a host of two GPUs (which the test plays)",
            [Rank(0, 3, gpu="a"), Rank(1, 3, gpu="b"), Rank(2, 3, gpu="a")],
            "there are 3 ranks but 2 GPUs on node1: expected one for each rank. --num_gpus (deepspeed), --nproc_per_node "
            "(torchrun) or --ntasks-per-node (srun) sets the ranks",
        ),
    ],
)
def test_ranks_that_were_not_started_alike_are_all_told(
    fault: str, ranks: list[Rank], message: str, record: Record
) -> None:
    told = meeting(ranks, free_port())
    assert told == [message] * len(ranks)
    record(fault, f"every rank is refused, with one line: {told[0]}", "nothing")


def test_a_rank_whose_partner_is_absent_says_who_is_missing(record: Record) -> None:
    (first,) = meeting([Rank(0, 4)], port := free_port(), seconds=0.5)
    assert first == (
        f"ranks 1-3 of 4 did not come to 127.0.0.1:{port} in time (FASTJEPA_RENDEZVOUS_SECONDS sets the seconds); there "
        "were 1 from node1: see the logs of the missing"
    )
    (other,) = meeting([Rank(1, 4, host="node2")], port := free_port(), seconds=0.5)
    assert other == (
        f"rank 1 on node2 could not reach 127.0.0.1:{port} (MASTER_ADDR:MASTER_PORT) within 0.5 s (Connection refused): "
        "is rank 0 running there, and is the port open to this host?"
    )
    record(
        "ranks that are not started",
        f"the others are refused after FASTJEPA_RENDEZVOUS_SECONDS, with one line: {str(first).partition(' to ')[0]}",
        "nothing",
    )


def test_rank_0_on_another_host_than_master_addr_says_where_it_runs(record: Record) -> None:
    (told,) = meeting([Rank(0, 2, master_addr="nowhere.invalid")], free_port(), seconds=0.5)
    assert isinstance(told, str)
    reason = r"\(.*[Nn]ame.*\)"
    assert re.fullmatch(
        rf"rank 0 runs on node1, which MASTER_ADDR = nowhere\.invalid does not lead to {reason}: expected rank 0's host",
        told,
    ), told
    record("MASTER_ADDR is not the host of rank 0", f"rank 0 is refused, with one line: {told}", "nothing")


def test_a_second_run_at_the_same_port_is_refused_and_the_first_goes_on(record: Record) -> None:
    run = [Rank(0, 2), Rank(1, 2, host="node2")]
    first = meeting(run, port := free_port())
    second = meeting(run, port)
    assert second == [
        f"rank 0 on node1 cannot listen on MASTER_PORT = {port} (Address already in use): another job, or another rank 0, "
        "uses it; choose another one, with --master_port (deepspeed, torchrun) or MASTER_PORT (srun)",
        f"rank 1 of 2 on node2 came to a run of 2 ranks at 127.0.0.1:{port} that is complete: two runs with the same port "
        "(--master_port chooses another), or a rank started with another WORLD_SIZE",
    ]
    one, two = first
    assert isinstance(one, Store)
    assert isinstance(two, Store)
    one.set("still", "here")
    assert two.get("still") == b"here"
    record(
        "a second run at the port of a living one",
        "its ranks are refused: rank 0 cannot listen on MASTER_PORT, rank 1 came to a run that is complete",
        "nothing; the first goes on",
    )


def test_a_rank_0_that_ends_while_the_ranks_meet_is_named() -> None:
    port = free_port()
    rank_0 = [TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)]

    def end_once_a_card_is_there() -> None:
        rank_0[0].wait(["fastjepa 0/card 1"], timedelta(seconds=50))
        rank_0.clear()

    threading.Thread(target=end_once_a_card_is_there).start()
    (told,) = meeting([Rank(1, 2, host="node2")], port)
    assert isinstance(told, str)
    assert re.fullmatch(
        rf"rank 1 on node2 lost rank 0 \(127.0.0.1:{port}\) while the ranks met \(.*\): see what rank 0 says", told
    ), told


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


def test_no_message_gives_up_before_the_watchdog(tmp_path: Path) -> None:
    """In whichever group, DeepSpeed's too."""
    look = """
import torch.distributed as dist
def micro_step(*_):
    groups = dist.distributed_c10d._world.pg_map
    backends = [group._get_backend(torch.device("cpu")) for group in groups]
    print("timeouts", *(each.options._timeout.total_seconds() for each in backends), file=sys.stderr, flush=True)
    os._exit(0)
deepspeed_engine.DeepSpeedEngine.micro_step = micro_step
"""
    zero = ["--ds_config", str(ROOT / "configs" / "zero2.json")]
    arguments = [*zero, "--config", write_recipe(tmp_path), "hang_timeout=5000", f"output_dir={tmp_path}/run"]
    for status, message in ended(start(look, arguments, world=2)):
        assert status == 0, message
        (line,) = re.findall("^timeouts (.*)", message, re.MULTILINE)
        timeouts = [float(each) for each in line.split()]
        assert len(timeouts) > 3, "DeepSpeed made no group"
        assert set(timeouts) == {10000.0}


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


def test_zero_3_takes_the_only_gpu_that_slurm_shows_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    import deepspeed

    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(distributed, "init_single_process_group", lambda: None)
    monkeypatch.setattr(deepspeed, "initialize", lambda *_, **__: [os.environ["LOCAL_RANK"]])
    assert deepspeed_patches._initialize(None, None, {}, "zero3.json") == "0"  # type: ignore[arg-type]
    assert os.environ["LOCAL_RANK"] == "3"


def test_folders_of_one_name_and_inode_number_that_the_ranks_do_not_share_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two machines, whose ranks are threads here."""
    turn, said, this = threading.Barrier(2, timeout=50), ["", ""], threading.local()

    def gather_objects(value: object, _group: object = None) -> list[object]:
        said_by: list[object] = said  # type: ignore[assignment]
        said_by[this.rank] = value
        turn.wait()
        values = list(said_by)
        turn.wait()
        return values

    monkeypatch.setattr(distributed, "gather_objects", gather_objects)
    monkeypatch.setattr(distributed, "rank", lambda: this.rank)

    def numbered_alike(path: Path, **_: object) -> os.stat_result:
        mode, _inode, *others = os.stat(path)  # noqa: PTH116  # Path's is this one
        return os.stat_result((mode, 7, *others))

    def check(rank: int, path: Path) -> str:
        this.rank = rank
        folder = RunFolder(path)
        folder.create()
        try:
            folder.check_shared()
        except RunFolderError as error:
            return str(error)
        return "shared"

    with ThreadPoolExecutor(2) as ranks:
        assert [*ranks.map(check, range(2), [tmp_path / "a"] * 2)] == ["shared"] * 2
        monkeypatch.setattr(Path, "stat", numbered_alike)
        told = [*ranks.map(check, range(2), [tmp_path / "a", tmp_path / "b"])]
    assert all("but rank 1 does not see there what rank 0 wrote" in each for each in told), told
    monkeypatch.undo()
    assert not list(tmp_path.glob("*/.*"))


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


def test_a_batch_that_cannot_be_shared_out_names_sizes_that_can() -> None:
    with pytest.raises(ConfigError, match="multiple of the number of ranks, 6, such as 96 or 102; or start 5 ranks"):
        BatchSizes.share(small_config(global_batch_size=100), 6)
    with pytest.raises(ConfigError, match=r"divisor of 50, .* such as 10"):
        BatchSizes.share(small_config(global_batch_size=100, micro_batch_size=24), 2)


def test_a_host_with_other_sources_and_settings_is_one_line_on_every_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], record: Record
) -> None:
    """The whole way, from the command line to what is printed. Rank 0 is this process."""
    shutil.copytree(ROOT / "fastjepa", tmp_path / "fastjepa", ignore=shutil.ignore_patterns("__pycache__", "*.xz"))
    (tmp_path / "fastjepa" / "errors.py").open("a").write("# edited on one host\n")
    ranks = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    sources = os.pathsep.join([str(tmp_path), str(ROOT / "kernels")])
    other = subprocess.Popen(
        [sys.executable, str(tmp_path / "fastjepa" / "train.py"), *DEBUG, "seed=7", f"output_dir={tmp_path}/run"],
        env=environment(**ranks, RANK="1", PYTHONPATH=sources),
        stderr=subprocess.PIPE,
        text=True,
    )
    for name, value in {**ranks, "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    statuses = [main([*DEBUG, f"output_dir={tmp_path}/run"])]
    told = [capsys.readouterr().err, other.communicate(timeout=100)[1]]
    assert [*statuses, other.returncode] == [2, 2]
    here = re.escape(socket.gethostname())
    line = (
        rf"fastjepa: error: the ranks are not alike: seed: 0 on rank 0 \({here}\), 7 on rank 1 \({here}\); "
        rf"sources of fastjepa: (\w+) on rank 0 \({here}\), (?!\1)\w+ on rank 1 \({here}\)\. Expected the same everywhere\n"
    )
    assert all(re.fullmatch(line, each) for each in told), told
    assert not (tmp_path / "run").exists()
    record(
        "a host of two with other sources and another seed",
        "both ranks end before they train with status 2 and one line, which names the ranks, their hosts and what differs",
        "nothing",
    )


SRUN = """#!{python}
# Starts two tasks on one node, as srun does; and once they train SLURM's signal of the time limit comes.
import os, pathlib, subprocess, sys, time
command = sys.argv[1:]
while command[0].startswith("--"):
    del command[0]
step = dict(SLURM_STEP_ID="0", SLURM_STEP_NUM_TASKS="2", SLURM_STEP_TASKS_PER_NODE="2", SLURM_STEP_NODELIST="localhost",
            SLURM_NODEID="0")
tasks = [subprocess.Popen(command, env=dict(os.environ, **step, SLURM_PROCID=str(i), SLURM_LOCALID=str(i)))
         for i in range(2)]
metrics = pathlib.Path("run/metrics.jsonl")
while all(task.poll() is None for task in tasks) and not (metrics.exists() and metrics.read_text()):
    time.sleep(0.01)
for task in tasks:
    task.send_signal({signal})
sys.exit(max(task.wait() for task in tasks))
"""


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    """A copy of the repository as the sbatch scripts see it, with an srun and an scontrol of our own in bin/."""
    for name in ("fastjepa", "kernels", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    programs = {
        "bin/scontrol": f'#!/bin/sh\necho "$@" >> {tmp_path}/scontrol.log\n',
        "bin/python": f'#!/bin/sh\nexec {sys.executable} "$@"\n',
        ".venv/bin/activate": f"PATH={tmp_path}/bin:$PATH\n",
    }
    for name, text in programs.items():
        write_program(tmp_path / name, text)
    return tmp_path


def write_program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def sbatch(cluster: Path, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The shell of a job has the SLURM variables of it too: they make no ranks."""
    job = {"SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "1", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"}
    return subprocess.run(
        ["bash", str(ROOT / "configs/slurm" / script), *arguments],
        cwd=cluster,
        env=environment(**job, MASTER_PORT=str(free_port())),
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )


def test_the_slurm_script_trains_on_all_tasks_until_the_time_is_up_and_queues_itself_again(
    cluster: Path, record: Record
) -> None:
    script = (ROOT / "configs/slurm/train.sbatch").read_text()
    (name,) = re.findall(r"^#SBATCH --signal=(\w+)@\d+ ", script, re.MULTILINE)  # B: would be for the script alone
    write_program(cluster / "bin/srun", SRUN.format(python=sys.executable, signal=int(signal.Signals[f"SIG{name}"])))
    done = sbatch(cluster, "train.sbatch", "--config", write_recipe(cluster), "epochs=40", "output_dir=run")
    assert done.returncode == 75, done.stderr[-3000:]
    assert "per step: 2 ranks x 1 micro batches x 4 images" in done.stderr
    assert len(re.findall(rf"^fastjepa: stopped \(rank [01]\): SIG{name}: ", done.stderr, re.MULTILINE)) == 2
    newest = latest(cluster / "run/checkpoints")
    assert newest is not None
    (step,) = set(re.findall(r"stopped after step (\d+)", done.stderr))
    assert step_of(newest) == int(step)
    assert (cluster / "scontrol.log").read_text() == "requeue 7\n"
    record(
        f"the time limit of a SLURM job draws near ({name} to both tasks, from an srun that the test plays)",
        "checkpoint of the step in which it came; exit status 75; the script queues the job again",
        "nothing",
    )


@pytest.mark.parametrize("script", ["train.sbatch", "single_gpu.sbatch"])
@pytest.mark.parametrize("status", [75, 1, 0])
def test_the_slurm_scripts_queue_again_what_was_preempted_and_nothing_else(
    script: str, status: int, cluster: Path
) -> None:
    write_program(cluster / "bin/srun", f"#!/bin/sh\nexit {status}\n")
    done = sbatch(cluster, script)
    assert done.returncode == status
    log = cluster / "scontrol.log"
    assert (log.read_text().startswith("requeue ") if log.exists() else False) == (status == 75)


def torchrun(ranks: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    return run([*command, str(ROOT / "fastjepa" / "train.py"), *arguments])


def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=600, check=False)


def test_runs_that_tests_start_see_no_gpu() -> None:
    assert run(["-c", "import os; print(repr(os.environ['CUDA_VISIBLE_DEVICES']))"]).stdout == "''\n"


def needs_two_gpus() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")


@pytest.mark.gpu
def test_a_process_without_a_launcher_trains_on_the_gpu(tmp_path: Path) -> None:
    done = run([str(ROOT / "fastjepa" / "train.py"), *DEBUG, f"output_dir={tmp_path}"])
    assert done.returncode == 0, done.stderr[-3000:]
    assert " on cuda" in done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("ds_config", [[], ["--ds_config", str(ROOT / "configs/zero2.json")]], ids=["plain", "zero2"])
def test_two_ranks_train_on_two_gpus(ds_config: list[str], tmp_path: Path) -> None:
    needs_two_gpus()
    done = torchrun(2, *DEBUG, *ds_config, f"output_dir={tmp_path}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "per step: 2 ranks" in done.stderr
    assert " on cuda" in done.stderr


@pytest.mark.gpu
def test_more_ranks_than_gpus_are_refused() -> None:
    gpus = torch.cuda.device_count()
    done = torchrun(gpus + 1, *DEBUG)
    assert done.returncode != 0
    assert f"there are {gpus + 1} ranks but {gpus} GPU" in done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_does_not_leave_the_other_waiting_in_nccl(rank: int, tmp_path: Path) -> None:
    needs_two_gpus()
    fault = at_step(9, "os.kill(os.getpid(), signal.SIGKILL)", rank=rank)
    results = ended(start(fault, [*DEBUG, "hang_timeout=20", f"output_dir={tmp_path}"], world=2))
    status, message = results[1 - rank]
    # Noticed by the ranks' exchange over the host, or, if the rank is in a kernel that never ends, by the watchdog.
    assert status in (1, EXIT_STATUS), message
    assert "lost contact with the other ranks" in message or f"Least far: rank {rank}" in message
