"""Processes of a run: who am I, and the few collectives that the trainer itself needs.

Any launcher that sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT will do (deepspeed, torchrun, srun with a
wrapper); without them the run is a single process.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore

from fastjepa.errors import ConfigError, FastjepaError

T = TypeVar("T")

# Long enough for the first rank to list a large data set, or for a slow disk to take a checkpoint, while the others wait.
TIMEOUT = timedelta(hours=1)


def init() -> torch.device:
    """Join the process group, share out the cores, and return this rank's device.

    Raises:
        ConfigError: the launcher's variables are incomplete, or there are more ranks on this machine than GPUs.
    """
    needed = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    given = [name for name in needed if name in os.environ]
    if "RANK" in given and len(given) < len(needed):
        missing = ", ".join(name for name in needed if name not in given)
        raise ConfigError(
            f"RANK is set but {missing} not: start with deepspeed or torchrun, or unset RANK for a single process"
        )
    if "RANK" not in given and int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        raise ConfigError(
            f"SLURM_NTASKS = {os.environ['SLURM_NTASKS']} but RANK is not set: srun would start as many runs side by side; "
            "start one task per node and torchrun or deepspeed in it"
        )
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_world = int(
        os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or os.environ.get("WORLD_SIZE", "1")
    )
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"LOCAL_RANK = {local_rank}, but this machine has {torch.cuda.device_count()} GPUs: start fewer ranks"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        if local_world > 1 and "OMP_NUM_THREADS" not in os.environ:
            # Ranks that each use all cores slow one another down more than tenfold.
            torch.set_num_threads(max(1, torch.get_num_threads() // local_world))
    if "RANK" in given and not dist.is_initialized():
        if device.type == "cuda":
            dist.init_process_group("nccl", device_id=device, timeout=TIMEOUT)
        else:
            dist.init_process_group("gloo", timeout=TIMEOUT)
    return device


def init_single_process_group() -> None:
    """A group of one, for libraries that insist on a group; needs no free port."""
    if not dist.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)


def finish() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def raise_together(error: FastjepaError | None) -> None:
    """If a rank has an error, raise on all of them, so that none waits for one that has given up.

    Also a barrier: no rank returns before all have called.
    """
    errors = {rank: each for rank, each in enumerate(gather_objects(error)) if each is not None}
    if error is not None:
        raise error
    for rank, other in errors.items():
        raise type(other)(f"rank {rank}: {other}")


def sum_over_ranks(values: Tensor) -> list[float]:
    """Element-wise sums of a 1-D tensor over all ranks, read back to the host."""
    if world_size() > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values.tolist()


def gather_objects(value: T) -> list[T]:
    """Every rank's value, in rank order, on every rank. Pickles: only for data of our own ranks."""
    if world_size() == 1:
        return [value]
    values: list[T] = [value] * world_size()
    dist.all_gather_object(values, value)
    return values
