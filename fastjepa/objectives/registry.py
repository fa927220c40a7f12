"""Finds methods by `objective.name`. A new one is a room of this folder and a line of `_METHODS`.

Modules of a method are imported when it is asked for: a run pays for its own only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastjepa.config import Config, ObjectiveConfig, file
from fastjepa.errors import ConfigError
from fastjepa.objectives.base import Method, Objective, check_objective


class _Entry(NamedTuple):
    """The classes of a method, or `module:name` of where they are."""

    settings: str | type[ObjectiveConfig]
    method: str | type[Method]


_METHODS: dict[str, _Entry] = {
    "ijepa": _Entry("fastjepa.objectives.ijepa.settings:IJEPAConfig", "fastjepa.objectives.ijepa.method:IJEPA"),
}


def register(name: str, settings: type[ObjectiveConfig], method: type[Method]) -> None:
    """Add a method that is not part of fastjepa, in this process."""
    _METHODS[name] = _Entry(settings, method)


def settings_class(name: str) -> type[ObjectiveConfig]:
    """The dataclass of a method's settings.

    Raises:
        ConfigError: there is no such method.
    """
    if name not in _METHODS:
        raise ConfigError(f"objective.name = {name or repr(name)}: expected one of: {', '.join(_METHODS)}")
    found: type[ObjectiveConfig] = _resolve(_METHODS[name].settings)
    return found


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """`fastjepa.config.file.load_config`, with the settings of the methods that there are."""
    return file.load_config(path, overrides, settings_class)


def config_from_record(record: Mapping[str, Any]) -> Config:
    """The settings that a checkpoint records, as they were written by this version or an earlier one.

    Raises:
        ConfigError: they have a key or value that this version does not know.
    """
    return file.config_from_record(record, settings_class)


def method_of(config: Config) -> Method:
    """The method of a run."""
    method: type[Method] = _resolve(_METHODS[config.objective.name].method)
    return method(config)


def build_objective(method: Method) -> Objective:
    """Freshly initialised networks: the same weights for the same seed, whatever was drawn before.

    Raises:
        TypeError: they break the contract of `Objective`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(method.config.seed)
        objective = method.build()
    check_objective(objective, method.evaluated)
    return objective


def _resolve(entry: Any) -> Any:
    if not isinstance(entry, str):
        return entry
    module, _, name = entry.partition(":")
    return getattr(import_module(module), name)
