"""Checkpoints: written atomically, read without unpickling, independent of world size and ZeRO stage.

    checkpoints/step_00001000/index.json               step, configuration, data set, where every element lies
    checkpoints/step_00001000/rank_00000.safetensors   that rank's share of weights, moments and EMA, fp32
    checkpoints/latest                                 the name of the newest complete checkpoint

A checkpoint is written into a hidden folder, flushed to disk and renamed: it is there as a whole or not at all. Only JSON and
safetensors are read, so a checkpoint from a stranger cannot run code.
"""

from __future__ import annotations

import json
import math
import os
import shutil
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
    if final.exists():  # the same step saved again, after a resume from before it
        shutil.rmtree(final)
    temporary.rename(final)
    _fsync(final.parent)
    _write_text(final.parent / LATEST, final.name)


def _raise_together(error: str | None, final: Path, temporary: Path) -> None:
    errors = {rank: e for rank, e in enumerate(distributed.gather_objects(error)) if e is not None}
    if errors:
        if distributed.rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        details = "; ".join(f"rank {rank}: {e}" for rank, e in errors.items())
        raise CheckpointError(f"could not write checkpoint {final}: {details}. Older checkpoints are intact")


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint below `folder`, or None if there is none."""
    try:
        name = (folder / LATEST).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None
    return folder / name


def read_index(checkpoint: Path) -> dict[str, Any]:
    """The index of a checkpoint, checked: known format, every shard there in full.

    Raises:
        CheckpointError: otherwise; the message says what is wrong with which file.
    """
    if checkpoint.is_file():
        raise CheckpointError(
            f"{checkpoint} is a file: expected a checkpoint folder with {INDEX}. Pickled checkpoints (.pt, .pth, .pth.tar) are "
            "not read here, since loading one can run code"
        )
    path = checkpoint / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{checkpoint} is not a complete checkpoint: {INDEX} is missing") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        found = index.get("format") if isinstance(index, dict) else type(index).__name__
        raise CheckpointError(f"{path}: format {found!r}, but this version of fastjepa reads format {FORMAT}")
    missing = {"step", "updates", "config", "dataset", "parameters", "shards"} - index.keys()
    if missing:
        raise CheckpointError(f"{path} is damaged: it lacks {sorted(missing)}")
    for shard in index["shards"]:
        file = checkpoint / Path(shard["file"]).name
        size = file.stat().st_size if file.is_file() else None
        if size != shard["bytes"]:
            found = "is missing" if size is None else f"has {size} bytes"
            raise CheckpointError(f"{file} {found}, expected {shard['bytes']} bytes: the checkpoint is damaged")
    return index


class _Reader:
    """Any range of any parameter's state, from whichever shards hold it."""

    def __init__(self, checkpoint: Path, index: dict[str, Any]) -> None:
        self._checkpoint = checkpoint
        self._where: dict[str, list[tuple[int, int, str, int, int]]] = {}  # name -> start, numel, file, tensor, offset
        for shard in index["shards"]:
            for number, name, start, numel, offset in shard["pieces"]:
                self._where.setdefault(name, []).append((start, numel, Path(shard["file"]).name, number, offset))
        self._files: dict[str, Any] = {}

    def read(self, name: str, kind: str, start: int, out: Tensor) -> None:
        """Fill the 1-D `out` with elements start... of the parameter's `kind` (weight, exp_avg or exp_avg_sq)."""
        filled = 0
        for piece_start, numel, file, number, offset in self._where.get(name, []):
            low, high = max(start, piece_start), min(start + out.numel(), piece_start + numel)
            if low < high:
                first = offset + low - piece_start
                stored = self._open(file, f"{number}.{kind}")[first : first + high - low]
                out[low - start : high - start].copy_(stored)
                filled += high - low
        if filled != out.numel():
            raise CheckpointError(f"{self._checkpoint}: {name}.{kind}: {filled} of {out.numel()} elements found: it is damaged")

    def _open(self, file: str, key: str) -> Any:
        path = self._checkpoint / file
        try:
            if file not in self._files:
                self._files[file] = safetensors.safe_open(path, framework="pt")
            return self._files[file].get_slice(key)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read as safetensors: {error}") from error


@torch.no_grad()
def load(checkpoint: Path, engine: Engine) -> RunState:
    """Bring weights, moments and EMA back into the engine, whatever world size and stage wrote them.

    Raises:
        CheckpointError: the checkpoint is damaged or of another model. The engine may then be partly overwritten.
    """
    index = read_index(checkpoint)
    _check_same_model(checkpoint, index["parameters"], engine.parameter_shapes())
    reader = _Reader(checkpoint, index)
    for piece in engine.pieces():
        reader.read(piece.name, "weight", piece.start, piece.view(piece.tensor))
        for key, moment in engine.optimizer.moments(piece.tensor).items():
            reader.read(piece.name, key, piece.start, piece.view(moment))
    engine.optimizer.updates = index["updates"]
    engine.publish_weights()
    return RunState(index["step"], index["config"], index["dataset"])


def _check_same_model(checkpoint: Path, saved: dict[str, list[int]], wanted: dict[str, list[int]]) -> None:
    for name in wanted.keys() | saved.keys():
        theirs, ours = saved.get(name), wanted.get(name)
        if theirs is None or ours is None or list(theirs) != list(ours):
            raise CheckpointError(
                f"{checkpoint} is of another model: {name} is {theirs or 'absent'} there and {ours or 'absent'} in this run. "
                "Use the configuration that it was trained with (config.yaml of its run), or another output_dir"
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

