"""Saves in the background, which older checkpoints are kept, and what a save that fails does to the run."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

import pytest

from fastjepa.checkpoint import checkpointer, restore, writer
from fastjepa.checkpoint.checkpointer import Checkpointer
from fastjepa.checkpoint.format import RunState, latest, newest_first
from fastjepa.errors import CheckpointError
from tests.support.checkpoints import assert_identical, state_of, torch_engine, train


def saver(folder: Path, keep_last: int = 3, keep_every: int | None = None, asynchronous: bool = True) -> Checkpointer:
    return Checkpointer(folder, keep_last=keep_last, keep_every=keep_every, asynchronous=asynchronous)


def test_training_goes_on_during_a_save_and_does_not_change_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = threading.Event()
    write = writer.write

    def write_after_training(*arguments: Any) -> Path:
        assert trained.wait(60)
        return write(*arguments)

    engine = train(torch_engine(), 0, 2)
    at_2 = writer.save(tmp_path / "waited", engine, RunState(2, {}, {}))
    monkeypatch.setattr(writer, "write", write_after_training)
    with saver(tmp_path / "background") as saves:
        saves.save(engine, RunState(2, {}, {}), last=False)
        train(engine, 2, 4)
        assert latest(tmp_path / "background") is None
        trained.set()
    for file in at_2.iterdir():
        assert (tmp_path / "background" / at_2.name / file.name).read_bytes() == file.read_bytes()
    other = torch_engine()
    restore.load(tmp_path / "background" / at_2.name, other)
    assert_identical(state_of(train(other, 2, 4)), state_of(engine))


@pytest.mark.parametrize("asynchronous", [True, False])
def test_the_newest_checkpoints_and_those_of_every_nth_step_are_kept(tmp_path: Path, asynchronous: bool) -> None:
    engine = torch_engine()
    with saver(tmp_path, keep_last=2, keep_every=4, asynchronous=asynchronous) as saves:
        for step in range(1, 8):
            saves.save(engine, RunState(step, {}, {}), last=False)
        saves.wait()
        assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", *(f"step_0000000{n}" for n in (4, 6, 7))]
        # The run has gone back to step 3: later checkpoints do not count, and stay until they are replaced.
        saves.save(engine, RunState(3, {}, {}), last=True)
    assert [p.name for p in newest_first(tmp_path)] == ["step_00000003"]
    assert sorted(p.name for p in tmp_path.glob("step_*")) == [f"step_0000000{n}" for n in (3, 4, 6, 7)]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_failed_save_is_logged_and_only_the_last_one_is_an_error(
    asynchronous: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = torch_engine()
    with saver(tmp_path, asynchronous=asynchronous) as saves:
        saves.save(engine, RunState(1, {}, {}), last=True)
        with monkeypatch.context() as full, caplog.at_level(logging.ERROR):
            full.setattr(writer, "SPACE_MARGIN", 1e12)
            saves.save(engine, RunState(2, {}, {}), last=False)
            saves.wait()
            assert "GiB free, but the checkpoint needs" in caplog.text
            assert f"newest is {tmp_path / 'step_00000001'}. The run goes on" in caplog.text
            with pytest.raises(CheckpointError, match="GiB free"):
                saves.save(engine, RunState(3, {}, {}), last=True)
        saves.save(engine, RunState(4, {}, {}), last=False)
    assert [p.name for p in newest_first(tmp_path)] == ["step_00000004", "step_00000001"]


def test_without_memory_for_a_copy_training_waits_and_logs_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(checkpointer, "free_memory", lambda: 1000)
    engine = torch_engine()
    with saver(tmp_path) as saves:
        for step in (1, 2):
            saves.save(engine, RunState(step, {}, {}), last=False)
            assert latest(tmp_path) == tmp_path / f"step_0000000{step}"
    assert caplog.text.count("training waits while checkpoints are written") == 1


def test_a_failed_save_does_not_end_the_run_even_if_latest_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "latest").mkdir()
    monkeypatch.setattr(writer, "SPACE_MARGIN", 1e12)
    with saver(tmp_path) as saves:
        saves.save(torch_engine(), RunState(1, {}, {}), last=False)
    assert f"newest is unknown ({tmp_path / 'latest'} cannot be read: " in caplog.text
