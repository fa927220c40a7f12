"""The command of the check, run within the test."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastjepa.data.check.__main__ import main

Report = dict[str, Any]


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., tuple[int, Report]]:
    """Runs the command; returns its exit status and the report that it wrote."""

    def run(source: Path, *arguments: str) -> tuple[int, Report]:
        file = tmp_path / "report.json"
        status = main([str(source), "--json", str(file), "--num_threads", "2", *arguments])
        return status, json.loads(file.read_text(encoding="utf-8"))

    return run
