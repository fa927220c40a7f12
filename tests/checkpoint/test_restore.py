"""Checkpoints: exact, independent of engine and world size, whole or absent, and harmless whoever wrote them."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.launch import launch
from benchmarks.proofs.equality import engine_steps, full_state, trajectory_config
from fastjepa.checkpoint import restore, writer
from fastjepa.checkpoint.format import RunState, latest, load_weights
from fastjepa.config import ModelConfig
from fastjepa.config.batch_sizes import BatchSizes
from fastjepa.engine.base import Engine
from fastjepa.engine.build import build_engine
from fastjepa.errors import CheckpointError, DamagedCheckpointError
from fastjepa.objectives.ijepa.objective import build_model
from tests.support.reliability import Record

CONFIG = trajectory_config()
SIZES = BatchSizes.share(CONFIG, world_size=1)
KINDS = ("weight", "exp_avg", "exp_avg_sq")


def said(found: pytest.ExceptionInfo[CheckpointError], folder: Path) -> str:
    """For `record`: the message, whatever the folder of the test."""
    return f"the error: {found.value}".replace(f"{folder}/", "")


def reseal(saved: Path) -> None:
    """Make the checksums fit the files, as whoever forges a checkpoint can."""
    names = [path.name for path in saved.iterdir() if path.name != "SHA256SUMS"]
    lines = [f"{hashlib.sha256((saved / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (saved / "SHA256SUMS").write_text("".join(lines))


def torch_engine(**changes: Any) -> Engine:
    config = trajectory_config(**changes)
    return build_engine(build_model(config), config, SIZES, torch.device("cpu"), ds_config=None)


def train(engine: Engine, first: int, last: int) -> Engine:
    engine_steps(engine, CONFIG, SIZES, 0, 1, first, last)
    return engine


def state_of(engine: Engine) -> dict[str, dict[str, Tensor]]:
    """fp32 weights and EMA, and both moments of those parameters that have them."""
    state = {"weight": full_state(engine)}
    for kind in KINDS[1:]:
        moments = [(p, engine.optimizer.moments(p.tensor)) for p in engine.pieces()]
        state[kind] = {p.name: p.view(m[kind]).clone() for p, m in moments if m}
    return state


def assert_identical(mine: dict[str, dict[str, Tensor]], expected: dict[str, dict[str, Tensor]]) -> None:
    for kind in KINDS:
        assert mine[kind].keys() == expected[kind].keys() != set()
        for name, tensor in expected[kind].items():
            assert torch.equal(mine[kind][name].view(-1), tensor.view(-1)), f"{name}.{kind}"


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """A checkpoint of step 6, the state there, and that of step 12."""
    engine = train(torch_engine(), 0, 6)
    path = writer.save(tmp_path_factory.mktemp("run"), engine, RunState(6, {"key": [1, None]}, {"images": 7}))
    at_6 = state_of(engine)
    return path, at_6, state_of(train(engine, 6, 12))


@pytest.fixture
def saved(uninterrupted: tuple[Path, Any, Any], tmp_path: Path) -> Path:
    """The checkpoint of step 6, a copy to be damaged."""
    return Path(shutil.copytree(uninterrupted[0].parent, tmp_path / "run")) / uninterrupted[0].name


@pytest.fixture(scope="module")
def reader() -> Engine:
    """For loads that fail: its state afterwards does not matter."""
    return torch_engine()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """What two processes wrote and read by ZeRO: their folder and results."""
    folder = tmp_path_factory.mktemp("two_ranks")
    launch("tests.workers.checkpoint", 2, str(folder))
    return folder, torch.load(folder / "results.pt", weights_only=True)


def test_loading_gives_back_every_bit(uninterrupted: tuple[Path, Any, Any]) -> None:
    path, at_6, _ = uninterrupted
    engine = torch_engine()
    assert restore.load(path, engine) == RunState(6, {"key": [1, None]}, {"images": 7})
    assert engine.optimizer.updates == 6
    assert_identical(state_of(engine), at_6)
    model = dict(engine.model.named_parameters())
    assert all(torch.equal(model[name], weight) for name, weight in at_6["weight"].items())


def test_a_resumed_run_ends_bit_for_bit_like_an_uninterrupted_one(uninterrupted: tuple[Path, Any, Any]) -> None:
    path, _, at_12 = uninterrupted
    engine = torch_engine(seed=1)
    restore.load(path, engine)
    assert_identical(state_of(train(engine, 6, 12)), at_12)


def test_parts_of_the_model_load_without_an_engine(uninterrupted: tuple[Path, Any, Any]) -> None:
    path, at_6, _ = uninterrupted
    for part in ("context_encoder", "target_encoder", "predictor"):
        weights = load_weights(path, part)
        assert {f"{part}.{name}" for name in weights} == {n for n in at_6["weight"] if n.startswith(part)}
        assert all(torch.equal(weight, at_6["weight"][f"{part}.{name}"]) for name, weight in weights.items())
    with pytest.raises(CheckpointError, match="has no decoder"):
        load_weights(path, "decoder")


@pytest.mark.parametrize("stage", [2, 3])
def test_plain_torch_reads_what_two_ranks_of_zero_wrote(stage: int, two_ranks: tuple[Path, Any]) -> None:
    folder, results = two_ranks
    path = latest(folder / f"zero{stage}")
    assert path is not None
    assert len(list(path.glob("rank_*.safetensors"))) == 2
    engine = torch_engine()
    restore.load(path, engine)
    assert engine.optimizer.updates == 3
    assert_identical(state_of(engine), results[f"zero{stage}"])


@pytest.mark.parametrize("stage", [2, 3])
def test_another_stage_reads_it_and_publishes_it_on_every_rank(stage: int, two_ranks: tuple[Path, Any]) -> None:
    _, results = two_ranks
    state, updates, published = results[f"zero{stage} read by zero1"]
    assert_identical(state, results[f"zero{stage}"])
    assert updates == 3
    assert published == [True, True]


@pytest.mark.parametrize("engine", ["zero2 fp32", "zero3 fp32", "zero2 bf16"])
def test_resumed_at_the_same_ranks_and_stage_it_trains_on_bit_for_bit(engine: str, two_ranks: tuple[Path, Any]) -> None:
    resumed, uninterrupted = two_ranks[1][f"{engine} goes on"]
    assert_identical(resumed, uninterrupted)


def test_ranks_with_other_errors_all_raise_that_of_the_first(two_ranks: tuple[Path, Any]) -> None:
    """Else one would look for an earlier checkpoint, and wait there for another that has ended."""
    assert two_ranks[1]["errors of two types"] == ["CheckpointError: lost", "CheckpointError: rank 0: lost"]


def test_the_average_of_a_bf16_run_is_kept_in_fp32(two_ranks: tuple[Path, Any]) -> None:
    _, results = two_ranks
    assert len(results["average"]) == 2
    assert max(results["average"]) < 1e-6


def test_the_target_encoder_of_a_bf16_run_is_its_average_rounded(two_ranks: tuple[Path, Any]) -> None:
    _, results = two_ranks
    assert results["bf16 dtypes"] == ["torch.bfloat16"]
    assert results["bf16 published"] == [True, True]


def test_a_rank_that_cannot_write_stops_all_and_the_earlier_checkpoint_stays(two_ranks: tuple[Path, Any]) -> None:
    folder, results = two_ranks
    for message in results["full disk"]:
        assert "rank 1: " in message
        assert "File too large" in message
        assert "rank 0: " not in message
    assert {path.name for path in (folder / "zero2").iterdir()} == {"latest", "step_00000003"}


def test_a_full_disk_leaves_the_earlier_checkpoint(saved: Path, reader: Engine, record: Record) -> None:
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
    record("a disk that fills up during a save (here: a limit of 16 KiB a file)", said(found, folder), "the save")


def test_a_file_in_the_place_of_the_folder_is_an_error(tmp_path: Path, reader: Engine) -> None:
    (tmp_path / "checkpoints").touch()
    with pytest.raises(CheckpointError, match=r"could not write checkpoint .*checkpoints/step_00000001"):
        writer.save(tmp_path / "checkpoints", reader, RunState(1, {}, {}))
    assert latest(tmp_path / "checkpoints") is None


def test_a_read_only_folder_is_an_error(read_only_folder: Path, reader: Engine, record: Record) -> None:
    with pytest.raises(CheckpointError, match="Permission denied") as found:
        writer.save(read_only_folder, reader, RunState(1, {}, {}))
    record("a checkpoint folder that is read-only", said(found, read_only_folder), "the save")


def test_saving_a_step_again_replaces_it(saved: Path, uninterrupted: tuple[Path, Any, Any]) -> None:
    engine = torch_engine(seed=1)
    assert writer.save(saved.parent, engine, RunState(6, {}, {})) == saved
    assert {path.name for path in saved.parent.iterdir()} == {"latest", "step_00000006"}
    other = torch_engine()
    restore.load(saved, other)
    assert_identical(state_of(other), state_of(engine))


@pytest.fixture(scope="module")
def killed_saves(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("killed_saves")
    launch("tests.workers.killed_saves", 1, str(folder))
    results: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return results


def test_a_kill_before_any_file_operation_leaves_a_whole_checkpoint(
    killed_saves: dict[str, Any], record: Record
) -> None:
    assert set(killed_saves["operations"]) == {"the next step", "the same step again"}
    for name, outcomes in killed_saves["operations"].items():
        loaded = [state for _, state in outcomes]
        assert set(loaded) == {1, 2}, outcomes
        assert loaded == sorted(loaded), outcomes  # the old one up to some moment, the new one from there
        assert any("latest" in operation for operation, _ in outcomes)
        assert any(operation.startswith("os.remove ") for operation, _ in outcomes), "no kill in the deletion"
        record(
            f"kill -9 before each of the {len(outcomes)} file operations of a background save of {name} and the deletion "
            "of the checkpoint before it",
            f"{loaded.count(1)} times the checkpoint before it loads, {loaded.count(2)} times the new one, whole to the "
            "last bit; the next save clears what was left behind",
            "nothing but the save",
        )


def test_a_kill_at_any_byte_of_a_save_leaves_the_checkpoint_before_it(
    killed_saves: dict[str, Any], record: Record
) -> None:
    kills = killed_saves["bytes"]
    for kill in kills:
        assert kill["signal"] == signal.SIGXFSZ, kill
        assert kill["cut there"], kill
        assert kill["loaded"] == kill["before"], kill
        assert len(kill["hidden"]) <= 2, kill  # does not grow from kill to kill
    files = sorted({kill["file"] for kill in kills})
    assert len(kills) >= 30
    assert len(files) == 5
    record(
        f"a background save killed (SIGXFSZ) at {len(kills)} random bytes ({', '.join(files)}), in one run",
        "each time the checkpoint before it loads, whole to the last bit; at most "
        f"{max(len(kill['hidden']) for kill in kills)} hidden files or folders were left, cleared by the next save",
        "nothing but the save",
    )


def test_there_is_no_latest_where_nothing_was_saved(tmp_path: Path) -> None:
    assert latest(tmp_path) is None
    assert latest(tmp_path / "absent") is None


def test_a_latest_that_is_no_text_is_an_error(saved: Path) -> None:
    for text in (b"\xff\xfe", b"", b"..", b"/etc", b"../step_00000006"):
        (saved.parent / "latest").write_bytes(text)
        with pytest.raises(CheckpointError, match="latest cannot be read"):
            latest(saved.parent)


def test_a_latest_of_a_deleted_checkpoint_is_an_error(saved: Path, reader: Engine) -> None:
    shutil.rmtree(saved)
    newest = latest(saved.parent)
    assert newest == saved
    with pytest.raises(CheckpointError, match=r"step_00000006 is not a complete checkpoint: index\.json is missing"):
        restore.load(newest, reader)


def test_a_checkpoint_of_another_model_is_refused(saved: Path) -> None:
    wider = torch_engine(
        model=ModelConfig(patch_size=4, embed_dim=36, depth=3, num_heads=3, predictor_embed_dim=12, predictor_depth=2)
    )
    before = state_of(wider)
    with pytest.raises(CheckpointError, match=r"another model: .*patch_embed.* is \[24, 2, 4, 4\] there and \[36, "):
        restore.load(saved, wider)
    assert_identical(state_of(wider), before)


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
def test_another_format_is_refused_with_the_version_that_wrote_it(
    saved: Path, reader: Engine, number: int, record: Record
) -> None:
    (saved / "index.json").write_text(json.dumps({"format": number, "fastjepa": "0.0.7"}))
    (saved / "SHA256SUMS").unlink()
    with pytest.raises(
        CheckpointError, match=f"format {number}, written by fastjepa 0.0.7, .* reads format 2"
    ) as found:
        restore.load(saved, reader)
    assert not isinstance(found.value, DamagedCheckpointError)
    record(f"a checkpoint of format {number}", said(found, saved.parent), "nothing was loaded")


@pytest.mark.parametrize("name", ["index.json", "rank_00000.safetensors", "model.safetensors"])
def test_one_wrong_bit_anywhere_is_found_and_leaves_the_engine_alone(
    saved: Path, reader: Engine, name: str, record: Record
) -> None:
    content = bytearray((saved / name).read_bytes())
    before = state_of(reader)
    for position in (0, len(content) // 3, len(content) - 1):
        content[position] ^= 4
        (saved / name).write_bytes(content)
        with pytest.raises(DamagedCheckpointError, match=f"{name} is damaged: its SHA-256 is not") as found:
            restore.load(saved, reader)
        content[position] ^= 4
    (saved / name).write_bytes(content)
    assert_identical(state_of(reader), before)
    assert restore.load(saved, torch_engine()).step == 6
    record(
        f"one wrong bit at the start, within or at the end of {name}", said(found, saved.parent), "nothing was loaded"
    )


@pytest.mark.parametrize("text", ["", "x" * 64, "0" * 64 + "  index.json\n", "\xff", "0" * 64 + "  ../index.json\n"])
def test_checksums_that_do_not_fit_are_refused(saved: Path, reader: Engine, text: str) -> None:
    (saved / "SHA256SUMS").write_text(text)
    with pytest.raises(DamagedCheckpointError):
        restore.load(saved, reader)


def test_the_checksums_are_those_of_sha256sum(saved: Path) -> None:
    done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=saved, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["index.json: OK", "model.safetensors: OK", "rank_00000.safetensors: OK"]


def test_whoever_may_read_the_index_may_read_every_file(uninterrupted: tuple[Path, Any, Any]) -> None:
    assert {path.stat().st_mode for path in uninterrupted[0].iterdir()} == {
        (uninterrupted[0] / "index.json").stat().st_mode
    }


def test_users_read_the_weights_with_safetensors_alone(uninterrupted: tuple[Path, Any, Any]) -> None:
    path, at_6, _ = uninterrupted
    weights = load_file(path / "model.safetensors")
    assert weights.keys() == at_6["weight"].keys()
    assert all(torch.equal(weight, at_6["weight"][name].view_as(weight)) for name, weight in weights.items())
    with safe_open(path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "step": "6", "config": '{"key": [1, null]}'}


@pytest.mark.parametrize("share", [0.9, 1.2])
def test_too_little_space_is_known_before_anything_is_written(
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
        f"nothing was written; {said(found, saved.parent).replace(str(saved.parent), 'checkpoints')}",
        "the save",
    )


def _set(*path: Any, to: Any) -> Callable[[Any], None]:
    def change(index: Any) -> None:
        for key in path[:-1]:
            index = index[key]
        index[path[-1]] = to

    return change


FIRST = ("shards", 0, "pieces", 0)  # tensor, name, start, numel, offset
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
    "a file elsewhere": _set("shards", 0, "file", to="../outside.safetensors"),
    "a file by its full path": _set("shards", 0, "file", to="/etc/passwd"),
    "a file name of zeros": _set("shards", 0, "file", to="\0"),
    "no file name": _set("shards", 0, "file", to=""),
    "a file size that is text": _set("shards", 0, "bytes", to="12"),
    "pieces is a number": _set("shards", 0, "pieces", to=3),
    "a piece is too short": _set(*FIRST, to=[0, "predictor.mask_token", 0, 12]),
    "a piece of no name": _set(*FIRST, 1, to=3),
    "a piece of another name": _set(*FIRST, 1, to="elsewhere"),
    "a piece of a tensor that is not there": _set(*FIRST, 0, to=999),
    "a negative start": _set(*FIRST, 2, to=-1),
    "a piece twice": lambda index: index["shards"][0]["pieces"].append(index["shards"][0]["pieces"][0]),
    "a gap": _set(*FIRST, 2, to=1),
    "a piece too small": _set(*FIRST, 3, to=1),
    "a negative size": _set(*FIRST, 3, to=-1),
    "a huge size": _set(*FIRST, 3, to=2**62),
    "a negative offset": _set(*FIRST, 4, to=-1),
    "an offset behind the tensor": lambda index: index["shards"][0]["pieces"][-1].__setitem__(4, 10_000),
    "a huge offset": _set(*FIRST, 4, to=2**62),
    "an offset beyond all numbers": _set(*FIRST, 4, to=10**40),
    "a fractional offset": _set(*FIRST, 4, to=0.5),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_an_index_that_does_not_fit_its_shards_is_refused(saved: Path, reader: Engine, damage: str) -> None:
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


def test_the_payload_of_these_tests_would_run(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Payload(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


def test_a_pickle_is_refused_and_does_not_run(tmp_path: Path, reader: Engine, record: Record) -> None:
    torch.save(Payload(tmp_path / "ran"), tmp_path / "checkpoint.pth")
    with pytest.raises(CheckpointError, match=r"checkpoint\.pth is a file: .* loading one can run code") as found:
        restore.load(tmp_path / "checkpoint.pth", reader)
    assert not (tmp_path / "ran").exists()
    record("a pickled checkpoint that runs code", f"did not run; {said(found, tmp_path)}", "nothing was loaded")


def test_a_checkpoint_of_deepspeed_is_refused_and_does_not_run(tmp_path: Path, reader: Engine, record: Record) -> None:
    """Its own ones are pickles: a folder, and a file that names it."""
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
        f"did not run; {said(found, folder.parent)}",
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
        f"did not run; {said(found, saved.parent)}",
        "nothing was loaded",
    )


@pytest.mark.parametrize("name", ["index.json", "model.safetensors", "SHA256SUMS"])
def test_a_pickle_in_the_place_of_another_file_does_not_run(
    name: str, saved: Path, tmp_path: Path, reader: Engine
) -> None:
    (saved / name).write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    if name != "SHA256SUMS":
        reseal(saved)
    with pytest.raises(DamagedCheckpointError):
        load_weights(saved, "predictor")
    if name != "model.safetensors":  # which a run does not read
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
    os.truncate(saved / "index.json", 2**40)  # a hole: takes no space
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
