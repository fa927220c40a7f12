"""Which checkpoint a run goes on from, and what has changed since it was written."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastjepa import distributed
from fastjepa.checkpoint import restore
from fastjepa.checkpoint.format import RunState, latest, newest_first
from fastjepa.config import Config
from fastjepa.errors import CheckpointError, ConfigError, DamagedCheckpointError
from fastjepa.objectives.registry import config_from_record, method_of
from fastjepa.optim.sharded_state import ShardedState
from fastjepa.run.folder import RunFolder

logger = logging.getLogger(__name__)

HARMLESS = frozenset(
    {
        "resume",
        "output_dir",
        "log_interval",
        "checkpoint_interval",
        "keep_last",
        "keep_every",
        "async_checkpoint",
        "evaluate",
        "max_skipped_steps",
        "hang_timeout",
        "data.num_threads",
        "data.prefetch",
        "data.max_bad_share",
        "data.val_source",
        "model.activation_checkpointing",
        "compile",
        "kernels",
    }
)
"""Settings that cannot change what is learnt, beside the method's `savings`."""


def resume(config: Config, folder: RunFolder, sharded: ShardedState, dataset: Mapping[str, Any], total: int) -> int:
    """Load the checkpoint to go on from, if there is one. All ranks call it.

    Args:
        dataset: size and fingerprint of the training images, as `RunState` has them.
        total: steps of the run.

    Returns:
        The number of steps done.

    Raises:
        CheckpointError: none of the checkpoints can be loaded, `resume: never` forbids it, or the folder holds a complete
            run of other settings.
    """
    # The first rank chooses for all: a rank that saw another folder, or an older one, would train another model.
    first = distributed.rank() == 0
    with distributed.share_errors():
        sources = checkpoints_to_resume(config.resume, folder) if first else []
    sources = distributed.gather_objects(sources)[0]
    if not sources:
        return 0
    source, state = _load_first_whole(sources, sharded)
    changes = distributed.gather_objects(differences(state.config, config) if first else [])[0]
    if changes and state.step >= total:
        raise CheckpointError(
            f"{folder.path} holds a complete run of other settings: {'; '.join(changes)}. Choose another output_dir"
        )
    if first:
        logger.info("resuming from %s", source)
        for change in changes:
            logger.warning("resuming with another setting: %s", change)
        if state.dataset.get("fingerprint") != dataset["fingerprint"]:
            logger.warning(
                "resuming on other data: the checkpoint saw %d images, now there are %d of other names",
                state.dataset.get("images", 0),
                dataset["images"],
            )
    return state.step


def _load_first_whole(sources: list[Path], sharded: ShardedState) -> tuple[Path, RunState]:
    """Load the first checkpoint that is not damaged; those before it are logged."""
    damaged: list[str] = []
    for source in sources:
        try:
            return source, restore.load(source, sharded)
        except DamagedCheckpointError as problem:
            damaged.append(str(problem))
            if distributed.rank() == 0 and len(sources) > 1:
                logger.warning("%s: looking for the checkpoint before it", problem)
    raise CheckpointError(
        f"no checkpoint can be loaded: {'; '.join(damaged)}. --resume can name another one to go on from"
    )


def checkpoints_to_resume(wanted: str, folder: RunFolder) -> list[Path]:
    """The checkpoints of the run, newest first; if it has none, the one that `resume` names. The first whole one will do.

    Args:
        wanted: the setting `resume`.

    Raises:
        CheckpointError: the run has a checkpoint and `resume: never` forbids to go on from it.
    """
    own = newest_first(folder.checkpoints)
    if wanted == "never" and own:
        raise CheckpointError(f"{folder.path} already holds {own[0].name}: choose another output_dir, or resume=auto")
    if wanted in ("auto", "never"):
        return own
    named = _checkpoint_in(wanted)
    if own and folder.checkpoints.resolve() not in named.resolve().parents:
        logger.warning("going on from %s: the run has begun, so --resume %s is not read again", own[0], wanted)
        return own
    return [named]


def _checkpoint_in(path: str) -> Path:
    """A checkpoint by its own path, or the newest of a run folder."""
    folder = Path(path)
    return latest(RunFolder(folder).checkpoints) or latest(folder) or folder


def differences(before: Mapping[str, Any], now: Config) -> list[str]:
    """Settings that changed since a checkpoint recorded them, but for those that cannot change what is learnt."""
    try:
        old: Mapping[str, Any] = dataclasses.asdict(config_from_record(before).resolved())
    except ConfigError:  # written by a version with other settings: compare what can be compared
        old = before
    harmless = HARMLESS.union(method_of(now).savings)
    return _differences(old, dataclasses.asdict(now.resolved()), "", harmless)


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str, harmless: frozenset[str]) -> list[str]:
    plain: Callable[[Any], Any] = lambda value: list(value) if isinstance(value, tuple) else value  # noqa: E731
    changes = []
    for key, value in new.items():
        name, before = prefix + key, old.get(key)
        if name in harmless:
            continue
        if isinstance(value, dict) and isinstance(before, dict):
            changes += _differences(before, value, f"{name}.", harmless)
        elif plain(before) != plain(value):
            changes.append(f"{name} was {plain(before)}, is {plain(value)}")
    return changes
