"""Whole runs from the command line: under SLURM's scripts, on ranks that differ, and on GPUs."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.launch import ROOT, free_port
from fastjepa.checkpoint.format import latest, step_of
from fastjepa.run.watchdog import EXIT_STATUS
from fastjepa.train import main
from tests.support.reliability import Record
from tests.support.tiny_run import at_step, ended, start, write_recipe

pytestmark = pytest.mark.processes

DEBUG = ["--config", str(ROOT / "configs" / "debug.yaml")]


def environment(**variables: str) -> dict[str, str]:
    """Return this process's environment, in which Python finds the package, with `variables`."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return {**os.environ, "PYTHONPATH": path, **variables}


def test_no_group_times_out_before_the_watchdog_speaks(tmp_path: Path) -> None:
    """This holds for every process group, DeepSpeed's included."""
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


def test_a_host_with_other_sources_and_settings_is_refused_in_one_line_on_every_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], record: Record
) -> None:
    """The test covers the whole way from the command line to the printed line. Rank 0 is this process."""
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
        "one of two hosts has other sources and another seed",
        "both ranks end before they train with status 2 and one line, which names the ranks, their hosts and what differs",
        "nothing",
    )


SRUN = """#!{python}
# Starts two tasks on one node, as srun does, and sends them SLURM's signal of the time limit once they train.
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
    """A copy of the repository as the sbatch scripts see it, with an scontrol (and room for an srun) of the test in bin/."""
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
    """Run a script as sbatch does: its shell has SLURM variables too, which must not make it a rank."""
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
    (name,) = re.findall(
        r"^#SBATCH --signal=(\w+)@\d+ ", script, re.MULTILINE
    )  # "B:" would send it to the script alone
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
        f"the time limit of a SLURM job draws near ({name} to both tasks, from a simulated srun)",
        "checkpoint of the step in which it came; exit status 75; the script queues the job again",
        "nothing",
    )


@pytest.mark.parametrize("script", ["train.sbatch", "single_gpu.sbatch"])
@pytest.mark.parametrize("status", [75, 1, 0])
def test_the_slurm_scripts_queue_only_preempted_jobs_again(script: str, status: int, cluster: Path) -> None:
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
    # The exchange of the ranks over the host notices it; or, if the rank waits in a kernel that never ends, the watchdog.
    assert status in (1, EXIT_STATUS), message
    assert "lost contact with the other ranks" in message or f"Least far: rank {rank}" in message
