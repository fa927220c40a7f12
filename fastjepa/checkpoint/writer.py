"""Writes checkpoints (`fastjepa.checkpoint.format`) atomically, each rank its own share.

A checkpoint is written into a hidden folder, flushed to disk and renamed, so that it is there as a whole or not at all.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from fastjepa import __version__, distributed
from fastjepa.checkpoint.format import FORMAT, INDEX, LATEST, MODEL, SUMS, Reader, RunState, set_aside, sha256
from fastjepa.errors import CheckpointError, describe_error
from fastjepa.host import GIB
from fastjepa.optim.sharded_state import ShardedState

SPACE_MARGIN = 1.05


@dataclass(frozen=True)
class Snapshot:
    """Everything that this rank has to write of one checkpoint."""

    state: RunState
    updates: int
    """Optimizer steps that were applied."""
    parameters: dict[str, list[int]]
    """The shapes of parameters and state buffers, by name."""
    tensors: dict[str, Tensor]
    """Flat fp32 tensors by their names in the shard. It is empty where another rank writes the same."""
    pieces: list[tuple[int, str, int, int, int]]
    """A tuple per run of elements: number of the tensor, name of the parameter, first element in the parameter, number of
    elements, first element in the tensor."""
    constants: Mapping[str, Tensor] = field(default_factory=dict)
    """Buffers that are never trained, fp32 on the CPU. Only model.safetensors holds them."""
    arrived: torch.cuda.Event | None = None
    """Set for a copy that is still on its way from the GPU: after this event the tensors can be read."""

    @classmethod
    def of(cls, sharded: ShardedState, state: RunState) -> Snapshot:
        """The state of training now. The tensors are those of training, not copies."""
        written = [piece for piece in sharded.pieces() if piece.written]
        distinct = {id(piece.tensor): piece.tensor for piece in written}
        numbers = {identity: number for number, identity in enumerate(distinct)}
        tensors = {}
        for number, tensor in enumerate(distinct.values()):
            for kind, values in {"weight": tensor, **sharded.optimizer.moments(tensor)}.items():
                tensors[f"{number}.{kind}"] = values.detach().view(-1)
        pieces = [(numbers[id(p.tensor)], p.name, p.start, p.numel, p.offset) for p in written]
        return cls(state, sharded.optimizer.updates, sharded.shapes(), tensors, pieces, sharded.constants())

    def copied(self, pinned: dict[str, Tensor]) -> Snapshot:
        """A copy in host memory, so that training may go on.

        The host does not wait for a GPU's tensors. They are copied in the order of the current stream, before the next step,
        which is queued behind, can change them.

        Args:
            pinned: page-locked memory for the copies, by name. Missing entries are added: the memory is slow to get, so keep
                it for the next copy.
        """
        tensors, arrived = {}, None
        for name, tensor in self.tensors.items():
            if not tensor.is_cuda:
                tensors[name] = tensor.clone()
                continue
            if name not in pinned:
                pinned[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            tensors[name] = pinned[name].copy_(tensor, non_blocking=True)
            arrived = torch.cuda.Event(blocking=True)
        if arrived is not None:
            arrived.record()
        return replace(self, tensors=tensors, arrived=arrived)

    def bytes_to_copy(self, pinned: dict[str, Tensor]) -> int:
        """Bytes of host memory that `copied` takes besides `pinned`. PyTorch rounds page-locked memory to powers of two."""
        new = {name: tensor for name, tensor in self.tensors.items() if name not in pinned}
        return sum(1 << (x.nbytes - 1).bit_length() if x.is_cuda else x.nbytes for x in new.values())

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def model_bytes(self) -> int:
        """Bytes of model.safetensors."""
        constants = sum(tensor.nbytes for tensor in self.constants.values())
        return sum(4 * math.prod(shape) for shape in self.parameters.values()) + constants


def save(folder: Path, sharded: ShardedState, state: RunState) -> Path:
    """Write a checkpoint of the state of training now; see `write`."""
    return write(folder, Snapshot.of(sharded, state))


def write(folder: Path, snapshot: Snapshot, group: ProcessGroup | None = None) -> Path:
    """Write a checkpoint below `folder` and make it the latest. All ranks call it; each writes its own share.

    Args:
        group: for the messages among the ranks; None: the default group.

    Raises:
        CheckpointError: too little free space, or a rank could not write. Older checkpoints are left as they were.
    """
    final = folder / f"step_{snapshot.state.step:08d}"
    temporary = folder / f".{final.name}.tmp"
    rank = distributed.rank()

    def on_every_rank(action: Callable[[], Any]) -> Any:
        """Run `action` on every rank; if it fails on one, raise on all of them."""
        result = error = cause = None
        try:
            result = action()
        except Exception as problem:  # noqa: BLE001  # whatever it is: the other ranks wait
            error, cause = describe_error(problem), problem
        errors = {rank: e for rank, e in enumerate(distributed.gather_objects(error, group)) if e is not None}
        if errors:
            if rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            details = "; ".join(f"rank {rank}: {e}" for rank, e in errors.items())
            raise CheckpointError(
                f"could not write checkpoint {final}: {details}. Older checkpoints are intact"
            ) from cause
        return result

    total = sum(distributed.gather_objects(snapshot.bytes, group)) + snapshot.model_bytes
    on_every_rank(lambda: _prepare(folder, temporary, total) if rank == 0 else None)
    shard = on_every_rank(
        lambda: _write_shard(temporary / f"rank_{rank:05d}.safetensors", snapshot) if snapshot.tensors else None
    )
    shards = [entry for entry in distributed.gather_objects(shard, group) if entry is not None]
    on_every_rank(lambda: _commit(temporary, final, snapshot, shards) if rank == 0 else None)
    return final


def _prepare(folder: Path, temporary: Path, total_bytes: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    needed, free = SPACE_MARGIN * total_bytes, shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(
            f"{folder} has {free / GIB:.2f} GiB free, but the checkpoint needs {needed / GIB:.2f} GiB: delete something, "
            "lower keep_last, or move output_dir to a larger disk"
        )
    temporary.mkdir()


def _write_shard(path: Path, snapshot: Snapshot) -> dict[str, Any]:
    if snapshot.arrived is not None:
        snapshot.arrived.synchronize()
    shapes = {name: list(tensor.shape) for name, tensor in snapshot.tensors.items()}
    digest = _write_tensors(path, shapes, snapshot.tensors.values(), {})
    return {"file": path.name, "bytes": path.stat().st_size, "pieces": snapshot.pieces, "sha256": digest}


def _commit(temporary: Path, final: Path, snapshot: Snapshot, shards: list[dict[str, Any]]) -> None:
    state = snapshot.state
    sums = {shard["file"]: shard.pop("sha256") for shard in shards}
    index = {
        "format": FORMAT,
        "fastjepa": __version__,
        "step": state.step,
        "updates": snapshot.updates,
        "config": state.config,
        "dataset": state.dataset,
        "parts": state.parts,
        "parameters": snapshot.parameters,
        "shards": shards,
    }
    _write_text(temporary / INDEX, json.dumps(index))
    sums[INDEX] = sha256(temporary / INDEX)
    sums[MODEL] = _write_model(temporary, index, snapshot.constants)
    _write_text(temporary / SUMS, "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items())))
    replaced = set_aside(final)
    if final.exists():  # the same step saved again, after a resume from before it
        final.rename(replaced)
    temporary.rename(final)
    _fsync(final.parent)
    _write_text(final.parent / LATEST, final.name)
    shutil.rmtree(replaced, ignore_errors=True)


def _write_model(checkpoint: Path, index: dict[str, Any], constants: Mapping[str, Tensor]) -> str:
    """Write model.safetensors, with whole weights, put together from the shards, and the constants. Returns its SHA-256."""
    reader = Reader(checkpoint, index)

    def weights() -> Iterator[Tensor]:
        for name, shape in index["parameters"].items():
            flat = torch.empty(math.prod(shape))
            for out, stored in reader.find(name, "weight", 0, flat):
                out.copy_(stored())
            yield flat
        yield from constants.values()

    shapes = index["parameters"] | {name: list(tensor.shape) for name, tensor in constants.items()}
    metadata = {key: json.dumps(index[key]) for key in ("step", "config", "parts")} | _sizes(index["config"])
    return _write_tensors(checkpoint / MODEL, shapes, weights(), metadata)


def _sizes(config: Mapping[str, Any]) -> dict[str, str]:
    """Sizes and image format in metadata of their own, so that the file is enough to build an encoder and to feed it."""
    keys = {
        "model": ("name", "embed_dim", "depth", "num_heads", "mlp_ratio", "patch_size"),
        "data": ("image_size", "in_channels", "mean", "std"),
    }
    found = {key: config[section][key] for section, names in keys.items() if section in config for key in names}
    return {("model" if key == "name" else key): json.dumps(value) for key, value in found.items()}


def _write_tensors(
    path: Path, shapes: dict[str, list[int]], tensors: Iterable[Tensor], metadata: dict[str, str]
) -> str:
    """Write a safetensors file of fp32 tensors, and return its SHA-256.

    safetensors' own writer is not used: it needs all tensors at once, its file has to be read again for the checksum, and
    nobody but the owner may read that file.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # so that the tensors are aligned
    head: list[bytes | memoryview] = [len(encoded).to_bytes(8, "little"), encoded]
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for part in itertools.chain(head, (tensor.cpu().numpy().data for tensor in tensors)):
            digest.update(part)
            file.write(part)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def remove_leftovers(folder: Path) -> None:
    """Delete what killed saves and deletions left behind. A checkpoint that was set aside and not replaced is put back."""
    for path in folder.glob(".step_*"):
        final = folder / path.stem.removeprefix(".")
        if path.suffix == ".replaced" and not final.exists():
            path.rename(final)
        elif path.suffix in (".tmp", ".deleted", ".replaced"):
            shutil.rmtree(path)


def delete(checkpoint: Path) -> None:
    """Delete a checkpoint. It is renamed first, so that a reader never sees a half-deleted one."""
    hidden = checkpoint.with_name(f".{checkpoint.name}.deleted")
    checkpoint.rename(hidden)
    shutil.rmtree(hidden)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_text(path: Path, text: str) -> None:
    """Write a file atomically: a reader sees the old text or the new."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    _fsync(path.parent)
