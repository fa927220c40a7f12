"""How a run is started: SLURM's variables, ranks that meet or say why not, and one plain line on every rank."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from benchmarks.launch import free_port
from fastjepa.batch_sizes import BatchSizes
from fastjepa.errors import ConfigError
from fastjepa.launch import Launch, first_host, read_launch, tasks_per_node
from fastjepa.rendezvous import Card, _contradiction, _ranks
from tests.small import small_config

ROOT = Path(__file__).parents[1]
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
MEET = """
import sys
from fastjepa import distributed
from fastjepa.errors import FastjepaError
try:
    distributed.init({"torch": sys.argv[1]})
    print(distributed.gather_objects(distributed.rank()))
except FastjepaError as error:
    sys.exit(str(error))
finally:
    distributed.finish()
"""


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
    cards = [Card(r, 4, "ab"[r // 2], {"torch": "2.13" if r < 2 else "2.12", "seed": "0"}, "") for r in range(4)]
    assert _contradiction(cards[:2]) is None
    problem = _contradiction(cards)
    assert problem is not None
    assert "torch: 2.13 on ranks 0-1 (a), 2.12 on ranks 2-3 (b)" in problem
    assert "seed" not in problem
    assert _ranks([5, 1, 2, 0]) == "ranks 0-2, 5"


class Ended(NamedTuple):
    status: int
    out: str
    err: str


def start(ranks: Sequence[tuple[int, int, str]], port: int) -> list[Ended]:
    """Processes with RANK, WORLD_SIZE and a version each, which meet at the port."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", MEET, version],
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
                "FASTJEPA_RENDEZVOUS_SECONDS": "8" if len(ranks) > 1 else "2",
                "RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "LOCAL_RANK": str(rank),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, world_size, version in ranks
    ]
    outputs = [process.communicate(timeout=60) for process in processes]
    return [Ended(p.returncode, *output) for p, output in zip(processes, outputs, strict=True)]


def test_ranks_that_are_alike_meet() -> None:
    assert [(ended.status, ended.out) for ended in start([(0, 2, "a"), (1, 2, "a")], free_port())] == [
        (0, "[0, 1]\n")
    ] * 2


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ([(0, 2, "a"), (1, 2, "b")], "the ranks are not alike: torch: a on rank 0 ("),
        ([(0, 2, "a"), (1, 3, "a")], "the ranks were started with different WORLD_SIZE: "),
        ([(0, 3, "a"), (1, 3, "a"), (1, 3, "a")], "rank 1 was started more than once"),
    ],
)
def test_ranks_that_were_not_started_alike_all_say_so(ranks: list[tuple[int, int, str]], message: str) -> None:
    for ended in start(ranks, free_port()):
        assert ended.status == 1
        assert message in ended.err
        assert "Traceback" not in ended.err


@pytest.mark.parametrize(
    ("rank", "message"),
    [(0, "rank 1 of 2 did not come to 127.0.0.1:"), (1, "rank 1 on HOST could not reach 127.0.0.1:")],
)
def test_a_rank_whose_partner_is_absent_says_who_is_missing(rank: int, message: str) -> None:
    (ended,) = start([(rank, 2, "a")], free_port())
    assert message.replace("HOST", socket.gethostname()) in ended.err
    assert len(ended.err.splitlines()) == 1


def test_a_port_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        (ended,) = start([(0, 2, "a")], port)
    assert f"cannot listen on MASTER_PORT = {port}" in ended.err
    assert "--master_port" in ended.err


def test_a_batch_that_cannot_be_shared_out_names_sizes_that_can() -> None:
    with pytest.raises(ConfigError, match="multiple of the number of ranks, 6, such as 96 or 102; or start 5 ranks"):
        BatchSizes.share(small_config(global_batch_size=100), 6)
    with pytest.raises(ConfigError, match=r"divisor of 50, .* such as 10"):
        BatchSizes.share(small_config(global_batch_size=100, micro_batch_size=24), 2)


SRUN = """#!{python}
# Starts two tasks on one node, as srun does.
import os, subprocess, sys
command = sys.argv[1:]
while command[0].startswith("--"):
    del command[0]
step = dict(SLURM_STEP_ID="0", SLURM_STEP_NUM_TASKS="2", SLURM_STEP_TASKS_PER_NODE="2", SLURM_STEP_NODELIST="localhost",
            SLURM_NODEID="0")
tasks = [subprocess.Popen(command, env=dict(os.environ, **step, SLURM_PROCID=str(i), SLURM_LOCALID=str(i)))
         for i in range(2)]
sys.exit(max(task.wait() for task in tasks))
"""


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    """A copy of the repository as the sbatch scripts see it, with an srun and an scontrol of our own in bin/."""
    for name in ("fastjepa", "kernels", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    programs = {
        "bin/srun": SRUN.format(python=sys.executable),
        "bin/scontrol": f'#!/bin/sh\necho "$@" >> {tmp_path}/scontrol.log\n',
        "bin/python": f'#!/bin/sh\nexec {sys.executable} "$@"\n',
        ".venv/bin/activate": f"PATH={tmp_path}/bin:$PATH\n",
    }
    for name, text in programs.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    return tmp_path


def sbatch(cluster: Path, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        "SLURM_JOB_ID": str(free_port()),
        "SLURM_CPUS_PER_TASK": "1",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": "0",
    }
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return subprocess.run(
        ["bash", str(ROOT / "configs/slurm" / script), *arguments],
        cwd=cluster,
        env={**os.environ, **environment, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )


def test_the_slurm_script_trains_on_all_tasks(cluster: Path) -> None:
    small = ["global_batch_size=8", "micro_batch_size=4", "epochs=0.004", "log_interval=1", "model.depth=1"]
    done = sbatch(cluster, "train.sbatch", "--config", "configs/debug.yaml", *small, f"output_dir={cluster}/run")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "per step: 2 ranks x 1 micro batches x 4 images" in done.stderr
    assert not (cluster / "scontrol.log").exists()


@pytest.mark.parametrize("script", ["train.sbatch", "single_gpu.sbatch"])
@pytest.mark.parametrize("status", [75, 1])
def test_the_slurm_scripts_queue_again_what_was_preempted_and_nothing_else(
    script: str, status: int, cluster: Path
) -> None:
    (cluster / "bin/srun").write_text(f"#!/bin/sh\nexit {status}\n")
    done = sbatch(cluster, script)
    assert done.returncode == status
    log = cluster / "scontrol.log"
    assert (log.read_text().startswith("requeue ") if log.exists() else False) == (status == 75)
