"""Checkpoints: written atomically, read without unpickling, independent of world size and ZeRO stage.

    checkpoints/step_00001000/index.json               step, configuration, data set, where every element lies
    checkpoints/step_00001000/rank_00000.safetensors   that rank's share of weights, moments and EMA, fp32
    checkpoints/latest                                 the name of the newest complete checkpoint

A checkpoint is written into a hidden folder, flushed to disk and renamed: it is there as a whole or not at all. Only JSON
and safetensors are read, so a checkpoint from a stranger cannot run code.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from fastjepa import __version__, distributed
from fastjepa.engine import Engine
from fastjepa.errors import CheckpointError

FORMAT = 1
INDEX, LATEST = "index.json", "latest"


@dataclass(frozen=True)
class RunState:
    """What a run needs besides weights and optimizer state to continue exactly."""

    step: int
    """Optimizer steps done."""
    config: dict[str, Any]
    """The resolved configuration, as nested dictionaries."""
    dataset: dict[str, Any]
    """Size and fingerprint of the training images."""


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_text(path: Path, text: str) -> None:
    """Atomically: a reader sees the old text or the new."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    _fsync(path.parent)


def _tensors_of(engine: Engine) -> tuple[list[Tensor], dict[int, int]]:
    """The distinct tensors that the pieces lie in, and the number of each by identity."""
    tensors = list({id(piece.tensor): piece.tensor for piece in engine.pieces()}.values())
    return tensors, {id(tensor): number for number, tensor in enumerate(tensors)}


def _write_shard(path: Path, engine: Engine) -> dict[str, Any]:
    tensors, numbers = _tensors_of(engine)
    contents = {}
    for number, tensor in enumerate(tensors):
        contents[f"{number}.weight"] = tensor.detach().view(-1)
        for key, moment in engine.optimizer.moments(tensor).items():
            contents[f"{number}.{key}"] = moment.view(-1)
    save_file(contents, path)
    _fsync(path)
    pieces = [(numbers[id(p.tensor)], p.name, p.start, p.numel, p.offset) for p in engine.pieces()]
    return {"file": path.name, "bytes": path.stat().st_size, "pieces": pieces}


def save(folder: Path, engine: Engine, state: RunState) -> Path:
    """Write a checkpoint below `folder` and make it the latest. All ranks call it; each writes its own share.

    Raises:
        CheckpointError: a rank could not write (disk full, no permission). Older checkpoints are left as they were.
    """
    final = folder / f"step_{state.step:08d}"
    temporary = folder / f".{final.name}.tmp"
    rank = distributed.rank()
    shard: dict[str, Any] | None = None
    error: str | None = None
    try:
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
    except OSError as problem:
        error = str(problem)
    _raise_together(error, final, temporary)
    try:
        if engine.writes_state:
            shard = _write_shard(temporary / f"rank_{rank:05d}.safetensors", engine)
    except (OSError, SafetensorError) as problem:
        error = str(problem)
    _raise_together(error, final, temporary)
    shards = [entry for entry in distributed.gather_objects(shard) if entry is not None]
    try:
        if rank == 0:
            _commit(temporary, final, engine, state, shards)
    except OSError as problem:
        error = str(problem)
    _raise_together(error, final, temporary)
    return final


def _commit(temporary: Path, final: Path, engine: Engine, state: RunState, shards: list[dict[str, Any]]) -> None:
    index = {
        "format": FORMAT,
        "fastjepa": __version__,
        "step": state.step,
        "updates": engine.optimizer.updates,
        "config": state.config,
        "dataset": state.dataset,
        "parameters": engine.parameter_shapes(),
        "shards": shards,
    }
    _write_text(temporary / INDEX, json.dumps(index))
    replaced = _set_aside(final)
    if final.exists():  # the same step saved again, after a resume from before it
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    temporary.rename(final)
    _fsync(final.parent)
    _write_text(final.parent / LATEST, final.name)
    shutil.rmtree(replaced, ignore_errors=True)


def _set_aside(checkpoint: Path) -> Path:
    """Where a checkpoint waits while another of the same step takes its place: a kill between the two renames loses none."""
    return checkpoint.with_name(f".{checkpoint.name}.replaced")


def _raise_together(error: str | None, final: Path, temporary: Path) -> None:
    errors = {rank: e for rank, e in enumerate(distributed.gather_objects(error)) if e is not None}
    if errors:
        if distributed.rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        details = "; ".join(f"rank {rank}: {e}" for rank, e in errors.items())
        raise CheckpointError(f"could not write checkpoint {final}: {details}. Older checkpoints are intact")


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint below `folder`, or None if there is none.

    Raises:
        CheckpointError: the file that names it cannot be read.
    """
    try:
        name = (folder / LATEST).read_text(encoding="utf-8").strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / LATEST} cannot be read: {error}") from error
    newest, replaced = folder / name, _set_aside(folder / name)
    return replaced if replaced.exists() and not newest.exists() else newest


def read_index(checkpoint: Path) -> dict[str, Any]:
    """The index of a checkpoint, checked: known format, every entry of its type, every shard there in full.

    Raises:
        CheckpointError: otherwise; the message says what is wrong with which file.
    """
    if checkpoint.is_file():
        raise CheckpointError(
            f"{checkpoint} is a file: expected a checkpoint folder with {INDEX}. Pickled checkpoints (.pt, .pth, .pth.tar) "
            "are not read here, since loading one can run code"
        )
    path = checkpoint / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{checkpoint} is not a complete checkpoint: {INDEX} is missing") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        found = index.get("format") if isinstance(index, dict) else type(index).__name__
        raise CheckpointError(f"{path}: format {found!r}, but this version of fastjepa reads format {FORMAT}")
    wrong = [key for key, is_valid in _ENTRIES.items() if not is_valid(index.get(key))]
    if wrong:
        raise CheckpointError(f"{path} is damaged: missing or not as fastjepa writes them: {wrong}")
    for shard in index["shards"]:
        file = checkpoint / shard["file"]
        size = file.stat().st_size if file.is_file() else None
        if size != shard["bytes"]:
            found = "is missing" if size is None else f"has {size} bytes"
            raise CheckpointError(f"{file} {found}, expected {shard['bytes']} bytes: the checkpoint is damaged")
    return index


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _are_shapes(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(s, list) and all(map(_is_count, s)) for s in value.values())


def _are_shards(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_shard, value))


def _is_shard(value: Any) -> bool:
    match value:
        case {"file": str(file), "bytes": size, "pieces": list(pieces)}:
            # A bare name: a checkpoint must not have files elsewhere read.
            return Path(file).name == file and _is_count(size) and all(_is_piece(piece, size) for piece in pieces)
    return False


def _is_piece(value: Any, size: int) -> bool:
    match value:
        case [number, str(), start, numel, offset] if all(map(_is_count, (number, start, numel, offset))):
            return 4 * (offset + numel) <= size
    return False


_ENTRIES: dict[str, Callable[[Any], bool]] = {
    "step": _is_count,
    "updates": _is_count,
    "config": lambda value: isinstance(value, dict),
    "dataset": lambda value: isinstance(value, dict),
    "parameters": _are_shapes,
    "shards": _are_shards,
}


class _Reader:
    """Any range of any parameter's state, from whichever shards hold it.

    Raises:
        CheckpointError: the shards do not hold every element of every parameter exactly once.
    """

    def __init__(self, checkpoint: Path, index: dict[str, Any]) -> None:
        self._checkpoint = checkpoint
        self._where: dict[str, list[tuple[int, int, str, int, int]]] = {}  # name -> start, numel, file, tensor, offset
        for shard in index["shards"]:
            for number, name, start, numel, offset in shard["pieces"]:
                self._where.setdefault(name, []).append((start, numel, shard["file"], number, offset))
        for name, shape in index["parameters"].items():
            end = 0
            for start, numel, *_ in sorted(self._where.get(name, [])):
                end = end + numel if start == end else -1
            if end != math.prod(shape):
                raise CheckpointError(f"{checkpoint} is damaged: its shards do not hold {name} {shape} exactly once")
        self._files: dict[str, Any] = {}

    def read(self, name: str, kind: str, start: int, out: Tensor) -> None:
        """Fill the 1-D `out` with elements start... of the parameter's `kind` (weight, exp_avg or exp_avg_sq)."""
        for piece_start, numel, file, number, offset in self._where.get(name, []):
            low, high = max(start, piece_start), min(start + out.numel(), piece_start + numel)
            if low < high:
                first = offset + low - piece_start
                stored = self._stored(file, f"{number}.{kind}", first, first + high - low)
                out[low - start : high - start].copy_(stored)

    def _stored(self, file: str, key: str, first: int, last: int) -> Tensor:
        path = self._checkpoint / file
        try:
            if file not in self._files:
                self._files[file] = safetensors.safe_open(path, framework="pt")
            stored: Tensor = self._files[file].get_slice(key)[first:last]
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read as safetensors: {error}") from error
        if stored.shape != (last - first,):
            raise CheckpointError(f"{path} is damaged: {key} has no elements {first} to {last - 1}")
        return stored


@torch.no_grad()
def load(checkpoint: Path, engine: Engine) -> RunState:
    """Bring weights, moments and EMA back into the engine, whatever world size and stage wrote them. All ranks call it.

    Raises:
        CheckpointError: the checkpoint is damaged or of another model. The engine may then be partly overwritten.
    """
    error: CheckpointError | None = None
    try:
        state = _read_into(checkpoint, engine)
    except CheckpointError as problem:
        error = problem
    distributed.raise_together(error)
    engine.publish_weights()
    return state


def _read_into(checkpoint: Path, engine: Engine) -> RunState:
    index = read_index(checkpoint)
    _check_same_model(checkpoint, index["parameters"], engine.parameter_shapes())
    reader = _Reader(checkpoint, index)
    for piece in engine.pieces():
        reader.read(piece.name, "weight", piece.start, piece.view(piece.tensor))
        for key, moment in engine.optimizer.moments(piece.tensor).items():
            reader.read(piece.name, key, piece.start, piece.view(moment))
    engine.optimizer.updates = index["updates"]
    return RunState(index["step"], index["config"], index["dataset"])


def _check_same_model(checkpoint: Path, saved: dict[str, list[int]], wanted: dict[str, list[int]]) -> None:
    for name in wanted | saved:
        theirs, ours = saved.get(name), wanted.get(name)
        if theirs is None or ours is None or list(theirs) != list(ours):
            raise CheckpointError(
                f"{checkpoint} is of another model: {name} is {theirs or 'absent'} there and {ours or 'absent'} in this "
                "run. Use the configuration that it was trained with (config.yaml of its run), or another output_dir"
            )


def load_weights(checkpoint: Path, prefix: str) -> dict[str, Tensor]:
    """One part of the model as a state dict, fp32: prefix context_encoder, target_encoder (the EMA) or predictor.

    Raises:
        CheckpointError: the checkpoint is damaged or has no such part.
    """
    index = read_index(checkpoint)
    reader = _Reader(checkpoint, index)
    weights = {}
    for name, shape in index["parameters"].items():
        if name.startswith(f"{prefix}."):
            flat = torch.empty(math.prod(shape))
            reader.read(name, "weight", 0, flat)
            weights[name.removeprefix(f"{prefix}.")] = flat.view(shape)
    if not weights:
        raise CheckpointError(f"{checkpoint} has no {prefix}")
    return weights
