"""The launcher's environment variables: how this process was started, by deepspeed or torchrun, by srun, or alone.

deepspeed and torchrun set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. For a task of srun, `read_launch`
derives these variables from SLURM's and sets them, because DeepSpeed and other libraries read them too.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import MutableMapping
from dataclasses import dataclass

from fastjepa.errors import ConfigError


@dataclass(frozen=True)
class Launch:
    """The facts that the launcher told this process."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    """Ranks on this machine."""
    master_addr: str
    """Host of rank 0."""
    master_port: int


def read_launch(environment: MutableMapping[str, str] = os.environ) -> Launch | None:
    """Read the launcher's variables; return None for a single process without a launcher.

    Raises:
        ConfigError: a variable is missing, is not a number, or contradicts another one.
    """
    if "RANK" not in environment:
        # Only srun sets SLURM_STEP_NUM_TASKS. SLURM_NTASKS and SLURM_PROCID say nothing: salloc and the shell of an
        # sbatch script, which start a single process, set them too.
        if "SLURM_PROCID" not in environment or _number(environment, "SLURM_STEP_NUM_TASKS", default=1) <= 1:
            return None
        _set_from_slurm(environment)
    needed = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    if missing := [name for name in needed if not environment.get(name)]:
        raise ConfigError(
            f"RANK is set without {', '.join(missing)}: start with deepspeed, torchrun or srun, or unset RANK for a single "
            "process"
        )
    world_size = _number(environment, "WORLD_SIZE")
    local_world = next((name for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if environment.get(name)), "WORLD_SIZE")
    launch = Launch(
        rank=_number(environment, "RANK"),
        world_size=world_size,
        local_rank=_number(environment, "LOCAL_RANK"),
        local_world_size=_number(environment, local_world),
        master_addr=environment["MASTER_ADDR"],
        master_port=_number(environment, "MASTER_PORT"),
    )
    if launch.rank >= world_size:
        raise ConfigError(f"RANK = {launch.rank}: expected less than WORLD_SIZE = {world_size} (ranks count from 0)")
    if not 0 < launch.master_port < 2**16:
        raise ConfigError(f"MASTER_PORT = {launch.master_port}: expected 1 to 65535")
    return launch


def _set_from_slurm(environment: MutableMapping[str, str]) -> None:
    needed = ("SLURM_LOCALID", "SLURM_NODEID", "SLURM_STEP_NODELIST", "SLURM_STEP_TASKS_PER_NODE")
    if missing := [name for name in needed if not environment.get(name)]:
        raise ConfigError(f"SLURM_STEP_NUM_TASKS is set without {', '.join(missing)}: start with srun")
    tasks = tasks_per_node(environment["SLURM_STEP_TASKS_PER_NODE"])
    node = _number(environment, "SLURM_NODEID")
    if node >= len(tasks):
        raise ConfigError(
            f"SLURM_NODEID = {node}: expected less than {len(tasks)}, the number of nodes in SLURM_STEP_TASKS_PER_NODE = "
            f"{environment['SLURM_STEP_TASKS_PER_NODE']}"
        )
    # The port must be the same for all tasks of a step, should differ from that of another job on the same node, and must
    # stay below the ports that operating systems hand out by themselves.
    number = _number(environment, "SLURM_JOB_ID", default=0) + _number(environment, "SLURM_STEP_ID", default=0)
    environment.update(
        RANK=environment["SLURM_PROCID"],
        WORLD_SIZE=environment["SLURM_STEP_NUM_TASKS"],
        LOCAL_RANK=environment["SLURM_LOCALID"],
        LOCAL_WORLD_SIZE=str(tasks[node]),
    )
    environment.setdefault("MASTER_ADDR", first_host(environment["SLURM_STEP_NODELIST"]))
    environment.setdefault("MASTER_PORT", str(10_000 + number % 20_000))


def first_host(nodes: str) -> str:
    """Return the first host of a list as SLURM writes it: "node[003-005,7],login1" -> "node003"."""
    first = re.match(r"(?:[^,\[\]]|\[[^\]]+\])+", nodes)
    if not first:
        raise ConfigError(f"SLURM_STEP_NODELIST = {nodes}: expected hosts, such as node[003-005,7]")
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first.group())


def tasks_per_node(counts: str) -> list[int]:
    """Expand SLURM's numbers of tasks per node: "8(x2),4" -> [8, 8, 4]."""
    parts = [re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part) for part in counts.split(",")]
    if not all(parts):
        raise ConfigError(f"SLURM_STEP_TASKS_PER_NODE = {counts}: expected numbers of tasks, such as 8(x2),4")
    return list(itertools.chain(*([int(part[1])] * int(part[2] or 1) for part in parts if part)))


def _number(environment: MutableMapping[str, str], name: str, *, default: int | None = None) -> int:
    value = environment.get(name, "") or ("" if default is None else str(default))
    if not re.fullmatch(r"\d+", value, re.ASCII):
        raise ConfigError(f"{name} = {value!r} in the environment: expected a number, 0 or more")
    return int(value)
