"""Writes the files of a profile: JSON, CSV, and a self-contained HTML page."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fastjepa.profiling.page import page
from fastjepa.profiling.report import Report, figures
from fastjepa.run.folder import explain_write_errors


def write_report(report: Report, folder: Path) -> None:
    """Write report.json, report.csv, operators.csv and report.html.

    Raises:
        RunFolderError: they cannot be written.
    """
    measured, knee = report.measurements(), report.knee
    content = {
        "command": report.command,
        "torch": torch.__version__,
        "config": asdict(report.config),
        "knee": knee.micro_batch_size if knee else None,
        "measurements": [{"of": of} | profile.as_dict(operators=of == "run") for of, profile in measured],
    }
    with explain_write_errors(str(folder), "Choose another folder"):
        (folder / "report.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        _write_csv(folder / "report.csv", [{"of": of} | figures(profile) for of, profile in measured])
        _write_csv(folder / "operators.csv", [asdict(row) for row in report.profile.split.operators])
        (folder / "report.html").write_text(page(report), encoding="utf-8")


def _write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
