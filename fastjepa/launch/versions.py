"""Versions, sources and settings, which must be the same on all ranks of a run."""

from __future__ import annotations

import dataclasses
import hashlib
import platform
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from fastjepa import __version__
from fastjepa.config import Config


def versions_and_settings(config: Config, ds_config: str | Path | None) -> dict[str, str]:
    """Collect the names and values that the ranks compare, without importing anything heavy."""
    python = ".".join(platform.python_version_tuple()[:2])
    facts = {
        "Python": python,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "fastjepa": __version__,
    }
    for package in ("fastjepa", "fastjepa_kernels"):
        facts[f"sources of {package}"] = _hash_of_sources(package)
    if ds_config is not None:
        facts["deepspeed"] = _version("deepspeed")
        file = Path(ds_config)
        facts["--ds_config"] = _hash(file.read_bytes()) if file.is_file() else "no file"
    else:
        facts["--ds_config"] = "not given"
    return facts | _flat(dataclasses.asdict(config))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]


def _hash_of_sources(package: str) -> str:
    spec = find_spec(package)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    folder = Path(next(iter(spec.submodule_search_locations)))
    files = sorted(folder.rglob("*.py"))
    return _hash(b"".join(f"{file.relative_to(folder)}\0".encode() + file.read_bytes() for file in files))


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Flatten nested settings: {"model": {"depth": 2}} -> {"model.depth": "2"}."""
    flat: dict[str, str] = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": str(value)}
    return flat
