"""The launcher's environment variables: SLURM's, those of deepspeed and torchrun, and mistakes in them."""

from __future__ import annotations

import pytest

from fastjepa.errors import ConfigError
from fastjepa.launch.environment import Launch, first_host, read_launch, tasks_per_node

GOOD = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
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
def test_the_first_host_of_slurms_list_is_found(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_a_list_of_hosts_that_slurm_would_not_write_is_named() -> None:
    with pytest.raises(ConfigError, match="SLURM_STEP_NODELIST = ,: expected hosts, such as "):
        first_host(",")


def test_slurms_numbers_of_tasks_are_expanded() -> None:
    assert tasks_per_node("8(x2),4") == [8, 8, 4]
    with pytest.raises(ConfigError, match=r"SLURM_STEP_TASKS_PER_NODE = 8\*2"):
        tasks_per_node("8*2")


def test_a_task_of_srun_is_a_rank_and_sets_the_variables_that_deepspeed_reads() -> None:
    environment = dict(SLURM)
    launch = read_launch(environment)
    assert launch == Launch(17, 20, 1, 4, "node003", 10_000 + 1234567 % 20_000)
    given = {
        name: environment[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
    }
    assert list(given.values()) == ["17", "20", "1", "4", "node003"]
    assert read_launch({**SLURM, "MASTER_PORT": "77", "MASTER_ADDR": "ib3"}) == Launch(17, 20, 1, 4, "ib3", 77)


def test_two_steps_of_one_job_use_different_ports() -> None:
    first, second = (read_launch({**SLURM, "SLURM_STEP_ID": step}) for step in "01")
    assert first is not None
    assert second is not None
    assert second.master_port == first.master_port + 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"SLURM_LOCALID": ""}, "SLURM_STEP_NUM_TASKS is set without SLURM_LOCALID: start with srun"),
        (
            {"SLURM_NODEID": "3"},
            "SLURM_NODEID = 3: expected less than 3, the number of nodes in SLURM_STEP_TASKS_PER_NODE",
        ),
    ],
)
def test_variables_of_slurm_that_cannot_be_right_are_named(changes: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        read_launch({**SLURM, **changes})
    assert message in str(error.value)


@pytest.mark.parametrize(("variables", "expected"), [({"LOCAL_WORLD_SIZE": "4"}, 4), ({"LOCAL_SIZE": "2"}, 2), ({}, 8)])
def test_the_ranks_of_a_machine_are_all_ranks_unless_the_launcher_counts_them(
    variables: dict[str, str], expected: int
) -> None:
    launch = read_launch({**GOOD, "WORLD_SIZE": "8", **variables})
    assert launch is not None
    assert launch.local_world_size == expected


def test_a_process_that_srun_did_not_start_is_alone() -> None:
    """Otherwise it would wait for ranks that nobody starts. An sbatch script has SLURM_PROCID and SLURM_NTASKS too."""
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
        ({"MASTER_ADDR": ""}, "RANK is set without MASTER_ADDR: start with "),
    ],
)
def test_variables_that_cannot_be_right_are_named(changes: dict[str, str], message: str) -> None:
    assert read_launch(dict(GOOD)) is not None
    with pytest.raises(ConfigError) as error:
        read_launch({**GOOD, **changes})
    assert message in str(error.value)
