"""Reading a checkpoint: the newest is found, damage of any kind is refused, and a file from a stranger runs no code."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastjepa.checkpoint import restore
from fastjepa.checkpoint.format import latest, load_weights, newest_first, step_of
from fastjepa.engine.base import Engine
from fastjepa.errors import CheckpointError, DamagedCheckpointError
from tests.support.checkpoints import error_text, reseal
from tests.support.reliability import Record


def test_parts_of_the_model_load_without_an_engine(uninterrupted: tuple[Path, Any, Any]) -> None:
    path, at_6, _ = uninterrupted
    for part in ("context_encoder", "target_encoder", "predictor"):
        weights = load_weights(path, part)
        tables = {name for name in weights if name.endswith("pos_embed")}
        assert len(tables) == 1
        trained = {f"{part}.{name}": weight for name, weight in weights.items() if name not in tables}
        assert trained.keys() == {n for n in at_6["weight"] if n.startswith(part)}
        assert all(torch.equal(weight, at_6["weight"][name]) for name, weight in trained.items())
    with pytest.raises(CheckpointError, match="has no decoder"):
        load_weights(path, "decoder")


def test_there_is_no_latest_checkpoint_where_nothing_was_saved(tmp_path: Path) -> None:
    assert latest(tmp_path) is None
    assert latest(tmp_path / "absent") is None


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("step_00000012", 12),
        ("step_123456789", 123456789),
        (".step_00000012.replaced", 12),
        ("step_12", None),
        (".step_00000012.tmp", None),
        ("global_step10", None),
        ("step_00000012.zip", None),
    ],
)
def test_the_step_is_in_the_name_of_a_checkpoint_and_other_names_have_none(name: str, step: int | None) -> None:
    assert step_of(Path("checkpoints") / name) == step


def test_checkpoints_are_listed_from_the_latest_to_earlier_steps_without_later_ones(tmp_path: Path) -> None:
    for name in ("step_00000004", "step_00000008", "step_00000012", ".step_00000006.tmp", "notes"):
        (tmp_path / name).mkdir()
    assert [path.name for path in newest_first(tmp_path)] == ["step_00000012", "step_00000008", "step_00000004"]
    (tmp_path / "latest").write_text("step_00000008\n")
    assert [path.name for path in newest_first(tmp_path)] == ["step_00000008", "step_00000004"]


def test_a_checkpoint_that_was_set_aside_and_not_replaced_is_the_latest(tmp_path: Path) -> None:
    (tmp_path / "latest").write_text("step_00000008")
    aside = tmp_path / ".step_00000008.replaced"
    aside.mkdir()
    assert latest(tmp_path) == aside
    (tmp_path / "step_00000008").mkdir()
    assert latest(tmp_path) == tmp_path / "step_00000008"


def test_a_latest_file_that_names_no_checkpoint_is_an_error(saved: Path) -> None:
    for text in (b"\xff\xfe", b"", b"..", b"/etc", b"../step_00000006"):
        (saved.parent / "latest").write_bytes(text)
        with pytest.raises(CheckpointError, match="latest cannot be read"):
            latest(saved.parent)


def test_a_latest_file_that_names_a_deleted_checkpoint_is_an_error(saved: Path, reader: Engine) -> None:
    shutil.rmtree(saved)
    newest = latest(saved.parent)
    assert newest == saved
    with pytest.raises(CheckpointError, match=r"step_00000006 is not a complete checkpoint: index\.json is missing"):
        restore.load(newest, reader)


def test_a_truncated_shard_is_refused(saved: Path, reader: Engine) -> None:
    shard = saved / "rank_00000.safetensors"
    size = shard.stat().st_size
    os.truncate(shard, size - 1)
    with pytest.raises(CheckpointError, match=f"rank_00000.safetensors has {size - 1} bytes, expected {size}"):
        restore.load(saved, reader)


def test_a_missing_shard_is_refused(saved: Path, reader: Engine) -> None:
    (saved / "rank_00000.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"rank_00000\.safetensors is missing"):
        restore.load(saved, reader)


@pytest.mark.parametrize("text", ['{"format": 1, "st', "", "[" * 100_000, "\0"])
def test_an_index_that_is_no_json_is_refused(saved: Path, reader: Engine, text: str) -> None:
    (saved / "index.json").write_text(text)
    reseal(saved)
    with pytest.raises(CheckpointError, match=r"index\.json cannot be read"):
        restore.load(saved, reader)


@pytest.mark.parametrize("index", [{"format": "2"}, {}, [], "fastjepa", None])
def test_an_index_without_a_format_is_damaged(saved: Path, reader: Engine, index: Any) -> None:
    (saved / "index.json").write_text(json.dumps(index))
    reseal(saved)
    with pytest.raises(DamagedCheckpointError, match="it names no format"):
        restore.load(saved, reader)


@pytest.mark.parametrize("number", [1, 3])
def test_another_format_is_refused_and_the_version_that_wrote_it_is_named(
    saved: Path, reader: Engine, number: int, record: Record
) -> None:
    (saved / "index.json").write_text(json.dumps({"format": number, "fastjepa": "0.0.7"}))
    (saved / "SHA256SUMS").unlink()
    with pytest.raises(
        CheckpointError, match=f"format {number}, written by fastjepa 0.0.7, .* reads format 2"
    ) as found:
        restore.load(saved, reader)
    assert not isinstance(found.value, DamagedCheckpointError)
    record(f"a checkpoint of format {number}", error_text(found, saved.parent), "nothing was loaded")


@pytest.mark.parametrize("text", ["", "x" * 64, "0" * 64 + "  index.json\n", "\xff", "0" * 64 + "  ../index.json\n"])
def test_checksums_that_do_not_match_are_refused(saved: Path, reader: Engine, text: str) -> None:
    (saved / "SHA256SUMS").write_text(text)
    with pytest.raises(DamagedCheckpointError):
        restore.load(saved, reader)


def _set(*path: Any, to: Any) -> Callable[[Any], None]:
    """Return a function that sets the entry of an index at these keys."""

    def change(index: Any) -> None:
        for key in path[:-1]:
            index = index[key]
        index[path[-1]] = to

    return change


FIRST = ("shards", 0, "pieces", 0)  # a piece: tensor, name, start, numel, offset
DAMAGE = {
    "step is text": _set("step", to="6"),
    "step is negative": _set("step", to=-1),
    "step is true": _set("step", to=True),
    "updates is a fraction": _set("updates", to=1.5),
    "updates is missing": lambda index: index.pop("updates"),
    "config is a list": _set("config", to=[]),
    "data set is null": _set("dataset", to=None),
    "parameters is a list": _set("parameters", to=[]),
    "a shape is a number": _set("parameters", "predictor.mask_token", to=12),
    "a shape is negative": _set("parameters", "predictor.mask_token", to=[-1, -1, 12]),
    "shards is an object": _set("shards", to={}),
    "no shards": _set("shards", to=[]),
    "a shard is text": _set("shards", 0, to="rank_00000.safetensors"),
    "a file outside the checkpoint": _set("shards", 0, "file", to="../outside.safetensors"),
    "a file by its absolute path": _set("shards", 0, "file", to="/etc/passwd"),
    "a null byte for a file name": _set("shards", 0, "file", to="\0"),
    "no file name": _set("shards", 0, "file", to=""),
    "a file size that is text": _set("shards", 0, "bytes", to="12"),
    "pieces is a number": _set("shards", 0, "pieces", to=3),
    "a piece is too short": _set(*FIRST, to=[0, "predictor.mask_token", 0, 12]),
    "a piece with a number for its name": _set(*FIRST, 1, to=3),
    "a piece of an unknown parameter": _set(*FIRST, 1, to="elsewhere"),
    "a piece of a tensor that is not there": _set(*FIRST, 0, to=999),
    "a negative start": _set(*FIRST, 2, to=-1),
    "a piece twice": lambda index: index["shards"][0]["pieces"].append(index["shards"][0]["pieces"][0]),
    "a gap": _set(*FIRST, 2, to=1),
    "a piece too small": _set(*FIRST, 3, to=1),
    "a negative size": _set(*FIRST, 3, to=-1),
    "a huge size": _set(*FIRST, 3, to=2**62),
    "a negative offset": _set(*FIRST, 4, to=-1),
    "an offset beyond the tensor": lambda index: index["shards"][0]["pieces"][-1].__setitem__(4, 10_000),
    "a huge offset": _set(*FIRST, 4, to=2**62),
    "an offset beyond int64": _set(*FIRST, 4, to=10**40),
    "a fractional offset": _set(*FIRST, 4, to=0.5),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_an_index_that_does_not_match_its_shards_is_refused(saved: Path, reader: Engine, damage: str) -> None:
    shutil.copy(saved / "rank_00000.safetensors", saved.parent / "outside.safetensors")
    index = json.loads((saved / "index.json").read_text())
    DAMAGE[damage](index)
    (saved / "index.json").write_text(json.dumps(index))
    reseal(saved)
    with pytest.raises(DamagedCheckpointError, match=r"is damaged|cannot be read as safetensors"):
        restore.load(saved, reader)


class Payload:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self._marker),))


def test_the_payload_runs_where_it_is_unpickled(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Payload(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


def test_a_pickle_is_refused_and_does_not_run(tmp_path: Path, reader: Engine, record: Record) -> None:
    torch.save(Payload(tmp_path / "ran"), tmp_path / "checkpoint.pth")
    with pytest.raises(CheckpointError, match=r"checkpoint\.pth is a file: .* loading one can run code") as found:
        restore.load(tmp_path / "checkpoint.pth", reader)
    assert not (tmp_path / "ran").exists()
    record("a pickled checkpoint that runs code", f"did not run; {error_text(found, tmp_path)}", "nothing was loaded")


def test_a_checkpoint_of_deepspeed_is_refused_and_does_not_run(tmp_path: Path, reader: Engine, record: Record) -> None:
    """DeepSpeed writes a folder of pickles, and a file `latest` that names it."""
    folder = tmp_path / "run" / "global_step10"
    folder.mkdir(parents=True)
    (folder.parent / "latest").write_text("global_step10")
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"):
        torch.save(Payload(tmp_path / "ran"), folder / name)
    with pytest.raises(CheckpointError, match="'global_step10' is no name of a checkpoint"):
        latest(folder.parent)
    for path in folder.iterdir():
        with pytest.raises(CheckpointError, match=r"\.pt is a file: .* loading one can run code"):
            restore.load(path, reader)
    for load in (lambda: restore.load(folder, reader), lambda: load_weights(folder, "predictor")):
        with pytest.raises(CheckpointError, match=r"index\.json is missing") as found:
            load()
    assert not (tmp_path / "ran").exists()
    record(
        "a checkpoint of DeepSpeed whose pickles run code",
        f"did not run; {error_text(found, folder.parent)}",
        "nothing was loaded",
    )


def test_a_pickle_in_the_place_of_a_shard_is_refused_and_does_not_run(
    saved: Path, tmp_path: Path, reader: Engine, record: Record
) -> None:
    shard = saved / "rank_00000.safetensors"
    payload = pickle.dumps(Payload(tmp_path / "ran"))
    shard.write_bytes(payload + bytes(shard.stat().st_size - len(payload)))
    reseal(saved)
    with pytest.raises(CheckpointError, match=r"rank_00000\.safetensors cannot be read as safetensors") as found:
        restore.load(saved, reader)
    assert not (tmp_path / "ran").exists()
    record(
        "a pickle that runs code, in the place of a shard, with checksums that fit",
        f"did not run; {error_text(found, saved.parent)}",
        "nothing was loaded",
    )


@pytest.mark.parametrize("name", ["index.json", "model.safetensors", "SHA256SUMS"])
def test_a_pickle_in_the_place_of_any_other_file_is_refused_and_does_not_run(
    name: str, saved: Path, tmp_path: Path, reader: Engine
) -> None:
    (saved / name).write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    if name != "SHA256SUMS":
        reseal(saved)
    with pytest.raises(DamagedCheckpointError):
        load_weights(saved, "predictor")
    if name != "model.safetensors":  # a run reads no weights from this file
        with pytest.raises(DamagedCheckpointError):
            restore.load(saved, reader)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("length", [2**63, 2**40, 2**26])
def test_a_safetensors_header_beyond_all_memory_is_refused(length: int, saved: Path, reader: Engine) -> None:
    shard = saved / "rank_00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[:8] = length.to_bytes(8, "little")
    for file in (shard, saved / "model.safetensors"):
        file.write_bytes(content)
    reseal(saved)
    with pytest.raises(DamagedCheckpointError, match=r"rank_00000\.safetensors cannot be read as safetensors"):
        restore.load(saved, reader)
    with pytest.raises(DamagedCheckpointError, match=r"model\.safetensors cannot be read as safetensors"):
        load_weights(saved, "predictor")


def test_a_huge_index_is_refused_before_it_is_read(saved: Path, reader: Engine) -> None:
    os.truncate(saved / "index.json", 2**40)  # a sparse file, which takes no space
    (saved / "SHA256SUMS").unlink()
    with pytest.raises(DamagedCheckpointError, match=r"index\.json cannot be read: it is larger than 1 GiB"):
        restore.load(saved, reader)


def test_a_shape_beyond_all_memory_is_refused_before_it_is_allocated(saved: Path) -> None:
    index = json.loads((saved / "index.json").read_text())
    index["parameters"]["predictor.huge"] = [2**45]
    index["shards"][0]["pieces"].append([0, "predictor.huge", 0, 2**45, 0])
    (saved / "index.json").write_text(json.dumps(index))
    reseal(saved)
    with pytest.raises(CheckpointError, match=r"index\.json is damaged: .*shards"):
        load_weights(saved, "predictor")
