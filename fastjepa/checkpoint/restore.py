"""Loads a checkpoint into an engine, whatever world size and ZeRO stage wrote it."""

from __future__ import annotations

from pathlib import Path

import torch

from fastjepa import distributed
from fastjepa.checkpoint.format import INDEX, MODEL, Reader, RunState, check_sums, read_index
from fastjepa.errors import CheckpointError
from fastjepa.optim.sharded_state import ShardedState


@torch.no_grad()
def load(checkpoint: Path, sharded: ShardedState) -> RunState:
    """Bring weights, moments, EMA and state buffers back into the memory of training. All ranks call it.

    World size and ZeRO stage of who wrote the checkpoint do not matter.

    The ranks share out the files to verify, and nothing is written to that memory before all are.

    Raises:
        DamagedCheckpointError: the checkpoint is incomplete or not as it was written. Nothing was changed.
        CheckpointError: it is of another model or format. Nothing was changed.
    """
    with distributed.share_errors():
        index = read_index(checkpoint)
        names = sorted([MODEL, INDEX, *(shard["file"] for shard in index["shards"])])
        check_sums(checkpoint, names[distributed.rank() :: distributed.world_size()])
        _check_same_model(checkpoint, index["parameters"], sharded.shapes())
        reader = Reader(checkpoint, index)
        parts = [
            part
            for piece in sharded.pieces()
            for kind, tensor in {"weight": piece.tensor, **sharded.optimizer.moments(piece.tensor)}.items()
            for part in reader.find(piece.name, kind, piece.start, piece.view(tensor))
        ]
    with distributed.share_errors():
        for out, stored in parts:
            out.copy_(stored())
    sharded.optimizer.updates = index["updates"]
    sharded.publish_weights()
    return RunState(index["step"], index["config"], index["dataset"], index.get("parts", {}))


def _check_same_model(checkpoint: Path, saved: dict[str, list[int]], wanted: dict[str, list[int]]) -> None:
    for name in wanted | saved:
        theirs, ours = saved.get(name), wanted.get(name)
        if theirs is None or ours is None or list(theirs) != list(ours):
            raise CheckpointError(
                f"{checkpoint} is of another model: {name} is {theirs or 'absent'} there and {ours or 'absent'} in this "
                "run. Use the configuration that it was trained with (config.yaml of its run), or another output_dir"
            )
