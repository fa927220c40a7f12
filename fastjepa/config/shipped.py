"""Finds the configurations that come with fastjepa, wherever it is installed: the YAML and DeepSpeed files of configs/.

The package's folder `configs` holds them: in a clone it is a link to the repository's configs/, in a wheel a copy of it.
"""

from __future__ import annotations

from pathlib import Path

import fastjepa

SHIPPED = (Path(fastjepa.__path__[0]) / "configs").resolve()
DEFAULT_CONFIG = SHIPPED / "default.yaml"


def find_config(name_or_path: str | Path) -> Path:
    """Returns the file that a user means by --config or --ds_config.

    A file of that path goes first. Otherwise `debug`, `debug.yaml` and `configs/debug.yaml` are the shipped debug.yaml,
    and `zero2`, `zero2.json` and `configs/zero2.json` the shipped zero2.json. A path that is neither is returned as it
    is: whoever reads it says that it is not there.
    """
    path = Path(name_or_path)
    if path.is_file() or path.is_absolute() or ".." in path.parts:
        return path
    name = path.relative_to("configs") if path.parts[:1] == ("configs",) else path
    candidates = (SHIPPED / f"{name}{suffix}" for suffix in ("", ".yaml", ".json"))
    return next((file for file in candidates if file.is_file()), path)


def shipped_names() -> list[str]:
    """The names by which --config finds the shipped runs: `debug`, `default`, ..."""
    return sorted(file.relative_to(SHIPPED).with_suffix("").as_posix() for file in SHIPPED.rglob("*.yaml"))
