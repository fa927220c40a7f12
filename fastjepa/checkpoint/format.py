"""The format of checkpoints, and how one is found and read: verified by checksum, without unpickling.

    checkpoints/step_00001000/index.json               step, configuration, data set, where every element lies
    checkpoints/step_00001000/rank_00000.safetensors   that rank's share of weights, moments and EMA, fp32
    checkpoints/step_00001000/model.safetensors        weights and position tables of all networks, fp32, for users
    checkpoints/step_00001000/SHA256SUMS               checksums of these files, for `sha256sum -c SHA256SUMS`
    checkpoints/latest                                 the name of the newest complete checkpoint

A checkpoint is read at any world size and ZeRO stage, whatever wrote it. Only JSON and safetensors are read, so that a
checkpoint from a stranger cannot run code. DeepSpeed's own checkpoints are pickles and are neither written nor read.
`writer` writes checkpoints, `checkpointer` decides when, `restore` loads one into an engine, `resume` chooses which.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
from safetensors import SafetensorError
from torch import Tensor

from fastjepa import __version__
from fastjepa.errors import CheckpointError, DamagedCheckpointError
from fastjepa.host import GIB

FORMAT = 2
INDEX, MODEL, SUMS, LATEST = "index.json", "model.safetensors", "SHA256SUMS", "latest"
MAX_TEXT_BYTES = GIB  # the index of 1,000 ranks has 0.1 GiB; one from a stranger must not fill the memory


@dataclass(frozen=True)
class RunState:
    """The facts that a run needs, besides weights and optimizer state, to continue exactly."""

    step: int
    """Optimizer steps done."""
    config: dict[str, Any]
    """The resolved configuration, as nested dictionaries."""
    dataset: dict[str, Any]
    """Size and fingerprint of the training images."""
    parts: dict[str, str] = field(default_factory=dict)
    """The role of each part of the model: "trained", or "EMA of" another part; and which one is evaluated."""


def step_of(checkpoint: Path) -> int | None:
    """The step in the name of a checkpoint's folder; None for other names."""
    found = re.fullmatch(r"\.?step_(\d{8,18})(?:\.replaced)?", checkpoint.name)
    return int(found[1]) if found else None


def newest_first(folder: Path) -> list[Path]:
    """The latest checkpoint below `folder` and those of earlier steps. Later ones are of a run that was gone back on.

    Raises:
        CheckpointError: the file that names the latest cannot be read.
    """
    newest = latest(folder)
    last = None if newest is None else step_of(newest)
    steps = {step: path for path in folder.glob("step_*") if (step := step_of(path)) is not None}
    earlier = [steps[step] for step in sorted(steps, reverse=True) if last is None or step < last]
    return earlier if newest is None else [newest, *earlier]


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
    newest, replaced = folder / name, set_aside(folder / name)
    if step_of(newest) is None or newest.parent != folder:
        raise CheckpointError(
            f"{folder / LATEST} cannot be read: {name[:80]!r} is no name of a checkpoint, such as step_00001000. Write one "
            "into the file, or delete it to go on from the newest"
        )
    return replaced if replaced.exists() and not newest.exists() else newest


def latest_for_message(folder: Path) -> str:
    """The newest complete checkpoint below `folder`, "none", or why it is not known."""
    try:
        return str(latest(folder) or "none")
    except CheckpointError as error:
        return f"unknown ({error})"


def set_aside(checkpoint: Path) -> Path:
    """The name under which a checkpoint waits while another of the same step takes its place.

    A kill between the two renames loses neither.
    """
    return checkpoint.with_name(f".{checkpoint.name}.replaced")


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
    if not path.exists():
        raise DamagedCheckpointError(f"{checkpoint} is not a complete checkpoint: {INDEX} is missing")
    if (checkpoint / SUMS).exists():
        check_sums(checkpoint, [INDEX])  # a damaged index is not one of another format
    try:
        index = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpointError(f"{path} cannot be read: {error}") from error
    found = index.get("format") if isinstance(index, dict) else None
    if type(found) is not int:
        raise DamagedCheckpointError(f"{path} is damaged: it names no format")
    if found != FORMAT:
        raise CheckpointError(
            f"{path}: format {found}, written by fastjepa {str(index.get('fastjepa'))[:40]}, but this version "
            f"({__version__}) reads format {FORMAT}. Use that one to go on, or start anew in another output_dir"
        )
    wrong = [key for key, is_valid in _ENTRIES.items() if not is_valid(index.get(key))]
    if wrong:
        raise DamagedCheckpointError(f"{path} is damaged: missing or not as fastjepa writes them: {wrong}")
    for shard in index["shards"]:
        file = checkpoint / shard["file"]
        size = file.stat().st_size if file.is_file() else None
        if size != shard["bytes"]:
            found = "is missing" if size is None else f"has {size} bytes"
            raise DamagedCheckpointError(f"{file} {found}, expected {shard['bytes']} bytes: the checkpoint is damaged")
    return index


def _read_text(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_TEXT_BYTES:
            raise DamagedCheckpointError(f"{path} cannot be read: it is larger than {MAX_TEXT_BYTES / GIB:g} GiB")
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DamagedCheckpointError(f"{path} cannot be read: {error}") from error


def read_sums(checkpoint: Path) -> dict[str, str]:
    """File name -> SHA-256 in hexadecimal.

    Raises:
        DamagedCheckpointError: the file is missing or not as fastjepa writes it.
    """
    sums = {}
    for line in _read_text(checkpoint / SUMS).splitlines():
        found = re.fullmatch(r"([0-9a-f]{64})  ([\w.]+)", line)
        if found is None:
            raise DamagedCheckpointError(f"{checkpoint / SUMS} is damaged: {line[:80]!r} is no checksum and name")
        sums[found[2]] = found[1]
    return sums


def check_sums(checkpoint: Path, names: Iterable[str]) -> None:
    """Compare these files with their checksums.

    Raises:
        DamagedCheckpointError: naming the first that is missing or differs.
    """
    sums = read_sums(checkpoint)
    for name in names:
        if name not in sums:
            raise DamagedCheckpointError(f"{checkpoint / SUMS} is damaged: it has no checksum of {name}")
        try:
            found = sha256(checkpoint / name)
        except OSError as error:
            raise DamagedCheckpointError(f"{checkpoint / name} cannot be read: {error}") from error
        if found != sums[name]:
            raise DamagedCheckpointError(f"{checkpoint / name} is damaged: its SHA-256 is not the one in {SUMS}")


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _are_shapes(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(s, list) and all(map(_is_count, s)) for s in value.values())


def _are_shards(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_shard, value))


def _is_shard(value: Any) -> bool:
    match value:
        case {"file": str(file), "bytes": size, "pieces": list(pieces)}:
            # Only a bare name is valid, so that a checkpoint cannot have files elsewhere read.
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
    "parts": lambda value: value is None or isinstance(value, dict),  # 0.1.0 wrote none
}


class Reader:
    """Reads any range of any parameter's state from the shards that hold it.

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
                raise DamagedCheckpointError(
                    f"{checkpoint} is damaged: its shards do not hold {name} {shape} exactly once"
                )
        self._files: dict[str, Any] = {}

    def find(self, name: str, kind: str, start: int, out: Tensor) -> list[tuple[Tensor, Callable[[], Tensor]]]:
        """Find the elements from `start` on of a parameter's `kind` (weight, exp_avg or exp_avg_sq), as many as `out` has.

        They are checked, but not read yet.

        Returns:
            Parts of the 1-D `out`, and for each a function that reads its values.
        """
        parts = []
        for piece_start, numel, file, number, offset in self._where.get(name, []):
            low, high = max(start, piece_start), min(start + out.numel(), piece_start + numel)
            if low < high:
                first = offset + low - piece_start
                stored = self._stored(file, f"{number}.{kind}", first, first + high - low)
                parts.append((out[low - start : high - start], stored))
        return parts

    def _stored(self, file: str, key: str, first: int, last: int) -> Callable[[], Tensor]:
        path = self._checkpoint / file
        try:
            if file not in self._files:
                self._files[file] = safetensors.safe_open(path, framework="pt")
            stored = self._files[file].get_slice(key)
            shape, dtype = stored.get_shape(), stored.get_dtype()
        except (OSError, SafetensorError) as error:
            raise DamagedCheckpointError(f"{path} cannot be read as safetensors: {error}") from error
        if len(shape) != 1 or shape[0] < last or dtype != "F32":
            raise DamagedCheckpointError(f"{path} is damaged: {key} has no fp32 elements {first} to {last - 1}")
        return lambda: stored[first:last]


def load_weights(checkpoint: Path, prefix: str) -> dict[str, Tensor]:
    """Load one part of the model as a state dict, fp32.

    Args:
        prefix: the name of the part; of I-JEPA context_encoder, target_encoder (the EMA) or predictor.

    Raises:
        CheckpointError: the checkpoint is damaged or has no such part.
    """
    read_index(checkpoint)  # refuses a format that is not known
    check_sums(checkpoint, [MODEL])
    path = checkpoint / MODEL
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            weights = {
                name.removeprefix(f"{prefix}."): file.get_tensor(name)
                for name in file.keys()  # noqa: SIM118 (not a dictionary)
                if name.startswith(f"{prefix}.")
            }
    except (OSError, SafetensorError) as error:
        raise DamagedCheckpointError(f"{path} cannot be read as safetensors: {error}") from error
    if not weights:
        raise CheckpointError(f"{checkpoint} has no {prefix}")
    return weights
