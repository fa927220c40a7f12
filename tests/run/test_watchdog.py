"""The watchdog: it leaves a run with progress alone, and ends one without, naming the rank that is behind."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fastjepa import distributed
from fastjepa.run.watchdog import EXIT_STATUS, Watchdog


def wait_until(done: Callable[[], bool]) -> None:
    end = time.monotonic() + 50
    while not done():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_run_with_progress_is_left_alone_and_one_without_is_ended(tmp_path: Path) -> None:
    statuses: list[int] = []
    with Watchdog(tmp_path / "beats", 0.4, end=statuses.append) as watchdog:
        for step in range(8):
            watchdog.at(f"step {step}")
            time.sleep(0.1)
        assert statuses == []
        wait_until(lambda: bool(statuses))
    assert statuses == [EXIT_STATUS]


BEHIND = json.dumps({"progress": 1, "where": "step 0, training", "process": 17, "host": "node2"})
AHEAD = json.dumps({"progress": 9, "where": "step 4, training", "process": 17, "host": "node2"})


@pytest.mark.parametrize(
    ("heartbeat", "least_far"),
    [
        (BEHIND, "rank 1: step 0, training (process 17 on node2)"),
        (AHEAD, "rank 0: step 2, training (process "),
        (None, "rank 1: no heartbeat"),
        ("{", "rank 1: no heartbeat"),
        ('{"progress": 9}', "rank 1: no heartbeat"),
    ],
    ids=["behind", "ahead", "none", "half written", "of another version"],
)
def test_the_rank_that_is_behind_is_named(
    heartbeat: str | None,
    least_far: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """This process is rank 0 of two; the heartbeat of rank 1 is a file that the test writes."""
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "gather_objects", lambda value, _group=None: [value, None])
    statuses: list[int] = []
    watchdog = Watchdog(tmp_path / "beats", 0.1, end=statuses.append)
    if heartbeat is not None:
        (tmp_path / "beats" / "rank_00001.json").write_text(heartbeat)
    for step in range(3):
        watchdog.at(f"step {step}, training")
    with watchdog:
        wait_until(lambda: bool(statuses))
    message = capfd.readouterr().err
    assert "fastjepa: error (rank 0): no progress for 0.1 s (hang_timeout). This rank: step 2, training." in message
    assert f" Least far: {least_far}" in message
    assert "wait_until" in message  # the stack of the training thread


def test_both_ranks_are_named_if_they_are_as_far(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "gather_objects", lambda value, _group=None: [value, None])
    statuses: list[int] = []
    watchdog = Watchdog(tmp_path, 0.1, end=statuses.append)
    (tmp_path / "rank_00001.json").write_text(BEHIND)
    watchdog.at("step 0, waiting for data")
    with watchdog:
        wait_until(lambda: bool(statuses))
    assert "rank 0: step 0, waiting for data (process " in (message := capfd.readouterr().err)
    assert "; rank 1: step 0, training (process 17 on node2). Start the same command again" in message


def test_heartbeats_of_an_earlier_run_are_removed_and_so_is_ones_own_at_the_end(tmp_path: Path) -> None:
    """A stale heartbeat would put the blame on a rank that is no more."""
    (tmp_path / "beats").mkdir()
    (tmp_path / "beats" / "rank_00007.json").write_text(BEHIND)
    with Watchdog(tmp_path / "beats", 60):
        wait_until(lambda: [path.name for path in (tmp_path / "beats").iterdir()] == ["rank_00000.json"])
    assert list((tmp_path / "beats").iterdir()) == []


def test_heartbeats_that_cannot_be_written_do_not_end_a_run(tmp_path: Path) -> None:
    statuses: list[int] = []
    watchdog = Watchdog(tmp_path / "beats", 0.4, end=statuses.append)
    shutil.rmtree(tmp_path / "beats")
    with watchdog:
        for step in range(8):
            watchdog.at(f"step {step}")
            time.sleep(0.1)
        assert watchdog._thread.is_alive()
    assert statuses == []
