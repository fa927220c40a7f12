"""Writing a checkpoint: whole or not at all, whenever it is killed or the disk is full, and readable without fastjepa."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from benchmarks.launch import launch
from fastjepa.checkpoint import restore, writer
from fastjepa.checkpoint.format import RunState, latest
from fastjepa.engine.base import Engine
from fastjepa.errors import CheckpointError
from tests.support.checkpoints import assert_identical, error_text, state_of, torch_engine
from tests.support.reliability import Record


@pytest.mark.processes
def test_sha256sum_accepts_the_checksums(saved: Path) -> None:
    done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=saved, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["index.json: OK", "model.safetensors: OK", "rank_00000.safetensors: OK"]


def test_all_files_have_the_permissions_of_the_index(uninterrupted: tuple[Path, Any, Any]) -> None:
    assert {path.stat().st_mode for path in uninterrupted[0].iterdir()} == {
        (uninterrupted[0] / "index.json").stat().st_mode
    }


def test_safetensors_alone_reads_the_weights(uninterrupted: tuple[Path, Any, Any]) -> None:
    path, at_6, _ = uninterrupted
    weights = load_file(path / "model.safetensors")
    tables = {name for name in weights if name.endswith("pos_embed")}
    assert len(tables) == 3
    assert weights.keys() - tables == at_6["weight"].keys()
    assert all(torch.equal(weight, weights[name].view_as(weight)) for name, weight in at_6["weight"].items())
    with safe_open(path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "step": "6", "config": '{"key": [1, null]}', "parts": "{}"}


def test_saving_a_step_again_replaces_its_checkpoint(saved: Path, uninterrupted: tuple[Path, Any, Any]) -> None:
    engine = torch_engine(seed=1)
    assert writer.save(saved.parent, engine, RunState(6, {}, {})) == saved
    assert {path.name for path in saved.parent.iterdir()} == {"latest", "step_00000006"}
    other = torch_engine()
    restore.load(saved, other)
    assert_identical(state_of(other), state_of(engine))


def test_a_full_disk_fails_the_save_and_keeps_the_earlier_checkpoint(
    saved: Path, reader: Engine, record: Record
) -> None:
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    folder = saved.parent
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, hard))
    try:
        with pytest.raises(
            CheckpointError, match=r"step_00000007: rank 0: .*File too large.*Older checkpoints are intact"
        ) as found:
            writer.save(folder, reader, RunState(7, {}, {}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert latest(folder) == saved
    assert restore.load(saved, torch_engine()).step == 6
    assert {path.name for path in folder.iterdir()} == {"latest", "step_00000006"}
    record(
        "a disk that fills up during a save (here: a limit of 16 KiB a file)",
        error_text(found, folder),
        "the save",
    )


@pytest.mark.processes
def test_a_rank_that_cannot_write_fails_the_save_on_all_ranks(two_ranks: tuple[Path, Any]) -> None:
    folder, results = two_ranks
    for message in results["full disk"]:
        assert "rank 1: " in message
        assert "File too large" in message
        assert "rank 0: " not in message
    assert {path.name for path in (folder / "zero2").iterdir()} == {"latest", "step_00000003"}


@pytest.mark.parametrize("share", [0.9, 1.2])
def test_too_little_space_is_an_error_before_anything_is_written(
    share: float, saved: Path, reader: Engine, monkeypatch: pytest.MonkeyPatch, record: Record
) -> None:
    needed = sum(path.stat().st_size for path in saved.iterdir())
    before = sorted(saved.parent.rglob("*"))
    usage = shutil._ntuple_diskusage(2**40, 2**40, round(share * needed))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    if share > 1:
        writer.save(saved.parent, reader, RunState(7, {}, {}))
        return
    with pytest.raises(CheckpointError, match=r"has 0.00 GiB free, but the checkpoint needs 0.00 GiB: delete") as found:
        writer.save(saved.parent, reader, RunState(7, {}, {}))
    assert sorted(saved.parent.rglob("*")) == before
    record(
        f"free space for {share:.0%} of a checkpoint, of {needed / 2**20:.2f} MiB",
        f"nothing was written; {error_text(found, saved.parent).replace(str(saved.parent), 'checkpoints')}",
        "the save",
    )


def test_a_file_in_the_place_of_the_folder_is_an_error(tmp_path: Path, reader: Engine) -> None:
    (tmp_path / "checkpoints").touch()
    with pytest.raises(CheckpointError, match=r"could not write checkpoint .*checkpoints/step_00000001"):
        writer.save(tmp_path / "checkpoints", reader, RunState(1, {}, {}))
    assert latest(tmp_path / "checkpoints") is None


def test_a_read_only_folder_is_an_error(read_only_folder: Path, reader: Engine, record: Record) -> None:
    with pytest.raises(CheckpointError, match="Permission denied") as found:
        writer.save(read_only_folder, reader, RunState(1, {}, {}))
    record("a checkpoint folder that is read-only", error_text(found, read_only_folder), "the save")


@pytest.fixture(scope="module")
def killed_saves(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results of tests.workers.killed_saves: an entry for each kill."""
    folder = tmp_path_factory.mktemp("killed_saves")
    launch("tests.workers.killed_saves", 1, str(folder))
    results: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return results


@pytest.mark.processes
def test_a_save_killed_before_any_file_operation_leaves_a_whole_checkpoint(
    killed_saves: dict[str, Any], record: Record
) -> None:
    assert set(killed_saves["operations"]) == {"the next step", "the same step again"}
    for name, outcomes in killed_saves["operations"].items():
        loaded = [state for _, state in outcomes]
        assert set(loaded) == {1, 2}, outcomes
        assert loaded == sorted(loaded), outcomes  # the old one up to some operation, the new one from there on
        assert any("latest" in operation for operation, _ in outcomes)
        assert any(operation.startswith("os.remove ") for operation, _ in outcomes), "no kill came during the deletion"
        record(
            f"kill -9 before each of the {len(outcomes)} file operations of a background save of {name} and the deletion "
            "of the checkpoint before it",
            f"{loaded.count(1)} times the checkpoint before it loads, {loaded.count(2)} times the new one, whole to the "
            "last bit; the next save clears what was left behind",
            "nothing but the save",
        )


@pytest.mark.processes
def test_a_save_killed_at_any_byte_leaves_the_checkpoint_before_it(
    killed_saves: dict[str, Any], record: Record
) -> None:
    kills = killed_saves["bytes"]
    for kill in kills:
        assert kill["signal"] == signal.SIGXFSZ, kill
        assert kill["cut there"], kill
        assert kill["loaded"] == kill["before"], kill
        assert len(kill["hidden"]) <= 2, kill  # remains do not pile up from kill to kill
    files = sorted({kill["file"] for kill in kills})
    assert len(kills) >= 30
    assert len(files) == 5
    record(
        f"a background save killed (SIGXFSZ) at {len(kills)} random bytes ({', '.join(files)}), in one run",
        "each time the checkpoint before it loads, whole to the last bit; at most "
        f"{max(len(kill['hidden']) for kill in kills)} hidden files or folders were left, cleared by the next save",
        "nothing but the save",
    )
