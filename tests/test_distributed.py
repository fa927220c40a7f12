"""Where one of two ranks fails between collectives, the other does not wait for it, and says which it was and why."""

from __future__ import annotations

import json

import pytest

from benchmarks.launch import launch


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    folder = tmp_path_factory.mktemp("together")
    launch("tests.workers.together", 2, str(folder), timeout=100)
    found: dict[str, list[str]] = json.loads((folder / "results.json").read_text())
    return found


def test_the_first_error_is_raised_on_all_ranks_unchanged_on_its_own(results: dict[str, list[str]]) -> None:
    assert results["another type"] == ["FastjepaError: rank 1: KeyError: 'x'", "KeyError: 'x'"]
    assert results["two"] == ["OSError: disk", "FastjepaError: rank 0: disk"]


def test_heartbeats_that_cannot_be_written(results: dict[str, list[str]]) -> None:
    first, second = results["heartbeats"]
    assert first.startswith("RunFolderError: ")
    assert "cannot be written (Not a directory). Choose another output_dir" in first
    assert second == first.replace("RunFolderError: ", "RunFolderError: rank 0: ")


def test_reading_a_checkpoint(results: dict[str, list[str]]) -> None:
    assert results["load"] == ["FastjepaError: rank 1: MemoryError: none left", "MemoryError: none left"]


def test_writing_a_checkpoint(results: dict[str, list[str]]) -> None:
    first, second = results["write"]
    assert first == second
    assert first.startswith("CheckpointError: could not write checkpoint ")
    assert "step_00000002: rank 0: MemoryError: full. Older checkpoints are intact" in first
    assert results["left"] == ["step_00000001"]


def test_copying_the_state_for_a_save_in_the_background(results: dict[str, list[str]]) -> None:
    assert results["copy"] == ["FastjepaError: rank 1: MemoryError: no copy", "MemoryError: no copy"]


def test_starting_the_loader(results: dict[str, list[str]]) -> None:
    assert results["loader"] == ["FastjepaError: rank 1: RuntimeError: DALI", "RuntimeError: DALI"]
