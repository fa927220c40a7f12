"""The process group of a run: joining it, this process's rank, and the few collectives that the trainer itself needs.

`fastjepa.launch` reads how the processes were started and lets them find one another.
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

# Seconds after which a collective gives up: the first rank may list a large data set, or write a checkpoint to a slow disk,
# while the others wait.
COLLECTIVE_TIMEOUT = 3600.0
# Groups of all ranks over the host, for messages that run beside training and must not mix with its collectives.
CONTROL_GROUPS = ("stop request", "checkpoints")

_control_groups: dict[str, dist.ProcessGroup] = {}


def init(facts: Mapping[str, str] | None = None) -> torch.device:
    """Join the process group, share out the cores, and return this rank's device.

    Args:
        facts: values that must be the same on all ranks (`fastjepa.launch.versions`). The ranks compare them first.

    Raises:
        ConfigError: the launcher's variables are wrong, the ranks did not meet, they differ in `facts`, or a machine has
            fewer GPUs than ranks.
    """
    launch = read_launch()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        # The modulo serves two cases. SLURM may show each task one GPU only, which is then number 0. And where ranks
        # outnumber the GPUs, two ranks take the same one, so that the rendezvous can tell all ranks.
        device = torch.device("cuda", launch.local_rank % torch.cuda.device_count() if launch else 0)
        torch.cuda.set_device(device)
    elif launch and launch.local_world_size > 1 and "OMP_NUM_THREADS" not in os.environ:
        # If each rank used all cores, the ranks would slow one another down more than tenfold.
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
        # Make the gloo groups now, with GPUs too: a host that gloo cannot reach then fails here, before any work is done.
        for name in CONTROL_GROUPS:
            _control_groups[name] = dist.new_group(backend="gloo", timeout=timedelta(seconds=seconds))
        # Joining had the short timeout of the rendezvous; from here on a rank may have to wait for another's disk.
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
    """Give every process group that exists now a timeout longer than the watchdog's.

    The watchdog names the rank that all wait for, so it must speak before a collective gives up. A new group starts with
    torch's own timeout (NCCL: 10 minutes, gloo: 30): call this again whenever groups were made.

    Args:
        hang_timeout: seconds after which the watchdog ends a run without progress.
    """
    seconds = min(max(COLLECTIVE_TIMEOUT, 2 * hang_timeout), 1e9)  # torch counts nanoseconds in 64 bits
    timeout = timedelta(seconds=seconds)
    for group in dist.distributed_c10d._world.pg_map:
        dist.distributed_c10d._set_pg_timeout(timeout, group)


def control_group(name: str) -> dist.ProcessGroup | None:
    """Return one of CONTROL_GROUPS, which hold all ranks; None if this process is alone."""
    return _control_groups[name] if world_size() > 1 else None


def is_lost_contact(error: RuntimeError) -> bool:
    """Tell if a collective failed because another rank ended or cannot be reached."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()


def reason_of(error: BaseException) -> str:
    """Return the reason in a message of gloo or NCCL, without the source line and condition before and the advice after."""
    place = r"^\[(?:enforce fail at \S+\] [^.]*\. |[^\]]*\] )"
    return re.sub(place, "", str(error).strip().partition("\n")[0]).partition(". ")[0]


def init_single_process_group() -> None:
    """Make a group of this process alone, for libraries that insist on a group. It needs no free port."""
    if not dist.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)


def wait_for_gloo() -> None:
    """Wait until gloo's threads have dropped the tensors of past collectives.

    They hold them for some milliseconds after a collective ends: up to 24 ms were seen on a busy machine.
    """
    if dist.is_initialized():  # with NCCL too: the control groups are gloo's
        time.sleep(0.2)


def finish() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        # A gloo thread that drops a tensor after the interpreter has ended aborts the process.
        wait_for_gloo()
        _control_groups.clear()
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def raise_together(error: Exception | None, group: dist.ProcessGroup | None = None) -> None:
    """Raise the error of the lowest failed rank on all ranks, so that no rank waits for one that has given up.

    A rank with an error of its own raises that if it is the lowest one; every other rank raises a FastjepaError, of the same
    type if the original is one. Call it on all ranks: no rank returns before all have called.
    """
    known = FastjepaError(describe_error(error)) if error and not isinstance(error, FastjepaError) else error
    for number, first in enumerate(gather_objects(known, group)):
        if first is not None:  # the same error on all ranks, because callers react to its type
            raise error if error and number == rank() else type(first)(f"rank {number}: {first}")


@contextmanager
def share_errors(group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Run the block on every rank; if one rank fails, raise on all of them. The block must hold no collectives."""
    error: Exception | None = None
    try:
        yield
    except Exception as problem:  # noqa: BLE001  # raised below
        error = problem
    raise_together(error, group)


def sum_over_ranks(values: Tensor) -> list[float]:
    """Sum a 1-D tensor element by element over all ranks, and read the sums back to the host."""
    if world_size() > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values.tolist()


def gather_objects(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Gather every rank's value, in rank order, on every rank. It pickles: use it only between ranks of one run.

    Args:
        group: a group of all ranks, for a thread beside the main one; None for the default group.
    """
    if world_size() == 1:
        return [value]
    values: list[T] = [value] * world_size()
    dist.all_gather_object(values, value, group=group)
    return values
