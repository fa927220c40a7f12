"""The watchdog: it leaves a run with progress alone, and names the rank that is behind when it ends one without."""

from __future__ import annotations

import time
from pathlib import Path

from fastjepa.run.watchdog import EXIT_STATUS, Watchdog


def test_a_run_that_gets_on_is_left_alone(tmp_path: Path) -> None:
    statuses: list[int] = []
    with Watchdog(tmp_path / "beats", 0.4, end=statuses.append) as watchdog:
        for step in range(8):
            watchdog.at(f"step {step}")
            time.sleep(0.1)
        assert statuses == []
        time.sleep(1.5)
    assert statuses == [EXIT_STATUS]
