"""Processes of a run: who am I, and the few collectives that the trainer itself needs.

Who starts them is the matter of `fastjepa.launch`, how they find one another that of `fastjepa.launch.rendezvous`.
"""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore

from fastjepa.errors import ConfigError, FastjepaError, describe_error
from fastjepa.launch.environment import Launch, read_launch
from fastjepa.launch.rendezvous import meet, seconds_to_wait

T = TypeVar("T")

# Seconds: long enough for the first rank to list a large data set, or for a slow disk to take a checkpoint, while the
# others wait.
COLLECTIVE_TIMEOUT = 3600.0
# Of the host's messages that go on beside training and must not come between its own.
CONTROL_GROUPS = ("stop request", "checkpoints")

_control_groups: dict[str, dist.ProcessGroup] = {}


def init(facts: Mapping[str, str] | None = None) -> torch.device:
    """Join the process group, share out the cores, and return this rank's device.

    Args:
        facts: what must be the same on all ranks (`fastjepa.launch.versions`); compared before anything else is done.

    Raises:
        ConfigError: the launcher's variables cannot be right, or the ranks did not meet, are not alike, or are more than the
            GPUs of a machine.
    """
    launch = read_launch()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        # Where SLURM leaves each task a GPU of its own, that is number 0. Where there are fewer GPUs than ranks, two get
        # the same one, which all ranks are told when they meet.
        device = torch.device("cuda", launch.local_rank % torch.cuda.device_count() if launch else 0)
        torch.cuda.set_device(device)
    elif launch and launch.local_world_size > 1 and "OMP_NUM_THREADS" not in os.environ:
        # Ranks that each use all cores slow one another down more than tenfold.
        torch.set_num_threads(max(1, torch.get_num_threads() // launch.local_world_size))
    if launch and not dist.is_initialized():
        _init_process_group(launch, device, facts or {})
    return device


def _init_process_group(launch: Launch, device: torch.device, facts: Mapping[str, str]) -> None:
    seconds = seconds_to_wait()
    gpu = {}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        gpu = {"gpu": properties.name, "gpu_id": str(properties.uuid)}
    store = meet(launch, {**facts, "device": device.type}, seconds, **gpu)
    try:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=launch.rank,
            world_size=launch.world_size,
            device_id=device if device.type == "cuda" else None,
            timeout=timedelta(seconds=seconds),
        )
        # Now, for a host that gloo cannot reach to be found before anything else is done, with GPUs too.
        for name in CONTROL_GROUPS:
            _control_groups[name] = dist.new_group(backend="gloo", timeout=timedelta(seconds=seconds))
        # Until here as patient as the rendezvous; from here on a rank may have to wait for another's disk.
        store.set_timeout(timedelta(seconds=COLLECTIVE_TIMEOUT))
        extend_timeouts()
    except RuntimeError as error:
        if not is_lost_contact(error):
            raise
        raise ConfigError(
            f"rank {launch.rank} on {socket.gethostname()}: the ranks met at {launch.master_addr}:{launch.master_port}, but "
            f"could not connect to one another ({reason_of(error)}): GLOO_SOCKET_IFNAME, and with GPUs NCCL_SOCKET_IFNAME "
            "too, names the network interface to use; NCCL_DEBUG=INFO says more"
        ) from error


def extend_timeouts(hang_timeout: float = 0.0) -> None:
    """Let no message of the groups that exist give up before the watchdog, which knows whom all wait for, has spoken.

    Each group has a timeout of its own, at first torch's (NCCL: 10 minutes, gloo: 30). To be called when groups were made.

    Args:
        hang_timeout: the watchdog's, in seconds.
    """
    timeout = timedelta(
        seconds=min(max(COLLECTIVE_TIMEOUT, 2 * hang_timeout), 1e9)
    )  # torch counts nanoseconds, in 64 bits
    for group in dist.distributed_c10d._world.pg_map:
        dist.distributed_c10d._set_pg_timeout(timeout, group)


def control_group(name: str) -> dist.ProcessGroup | None:
    """One of CONTROL_GROUPS: all ranks again, over the host. None: this process is alone."""
    return _control_groups[name] if world_size() > 1 else None


def is_lost_contact(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank ended, or cannot be reached."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()


def reason_of(error: BaseException) -> str:
    """What went wrong, of a message of gloo or NCCL: without the place and the condition in their sources, and advice."""
    place = r"^\[(?:enforce fail at \S+\] [^.]*\. |[^\]]*\] )"
    return re.sub(place, "", str(error).strip().partition("\n")[0]).partition(". ")[0]


def init_single_process_group() -> None:
    """A group of one, for libraries that insist on a group; needs no free port."""
    if not dist.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)


def wait_for_gloo() -> None:
    """Give gloo's threads the time to drop the tensors of past collectives, which they hold for milliseconds longer than
    those last (24 were seen on a busy machine)."""
    if dist.is_initialized():  # be it for NCCL: the control groups are gloo's
        time.sleep(0.2)


def finish() -> None:
    if dist.is_initialized():
        # For this they need the interpreter: once it has ended, they abort the process.
        wait_for_gloo()
        _control_groups.clear()
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def raise_together(error: Exception | None, group: dist.ProcessGroup | None = None) -> None:
    """If ranks have errors, raise that of the first of them on all, so that none waits for one that has given up.

    Other ranks get it as a FastjepaError, of its type if it is one. Also a barrier: no rank returns before all have called.
    """
    known = FastjepaError(describe_error(error)) if error and not isinstance(error, FastjepaError) else error
    for number, first in enumerate(gather_objects(known, group)):
        if first is not None:  # one error for all: what is done about it may depend on its type
            raise error if error and number == rank() else type(first)(f"rank {number}: {first}")


@contextmanager
def share_errors(group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """All ranks do what is within, which has no collectives, or none goes on: an error on one is raised on all."""
    error: Exception | None = None
    try:
        yield
    except Exception as problem:  # noqa: BLE001  # raised below
        error = problem
    raise_together(error, group)


def sum_over_ranks(values: Tensor) -> list[float]:
    """Element-wise sums of a 1-D tensor over all ranks, read back to the host."""
    if world_size() > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values.tolist()


def gather_objects(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Every rank's value, in rank order, on every rank. Pickles: only for data of our own ranks.

    Args:
        group: all ranks again, for a thread beside the main one; None: the default group.
    """
    if world_size() == 1:
        return [value]
    values: list[T] = [value] * world_size()
    dist.all_gather_object(values, value, group=group)
    return values
