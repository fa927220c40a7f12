"""Loading a checkpoint: exact to the last bit, at any ZeRO stage and number of ranks, or refused with nothing changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fastjepa.checkpoint import restore
from fastjepa.checkpoint.format import RunState, latest
from fastjepa.config import ModelConfig
from fastjepa.engine.base import Engine
from fastjepa.errors import CheckpointError, DamagedCheckpointError
from tests.support.checkpoints import assert_identical, error_text, state_of, torch_engine, train
from tests.support.reliability import Record


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


def test_a_checkpoint_of_another_model_is_refused(saved: Path) -> None:
    wider = torch_engine(model=ModelConfig(patch_size=4, embed_dim=36, depth=3, num_heads=3))
    before = state_of(wider)
    with pytest.raises(CheckpointError, match=r"another model: .*patch_embed.* is \[24, 2, 4, 4\] there and \[36, "):
        restore.load(saved, wider)
    assert_identical(state_of(wider), before)


@pytest.mark.parametrize("name", ["index.json", "rank_00000.safetensors", "model.safetensors"])
def test_one_wrong_bit_in_any_file_is_found_and_the_engine_stays_unchanged(
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
        f"one wrong bit at the start, within or at the end of {name}",
        error_text(found, saved.parent),
        "nothing was loaded",
    )


@pytest.mark.processes
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


@pytest.mark.processes
@pytest.mark.parametrize("stage", [2, 3])
def test_another_stage_reads_it_and_publishes_the_weights_on_every_rank(
    stage: int, two_ranks: tuple[Path, Any]
) -> None:
    _, results = two_ranks
    state, updates, published = results[f"zero{stage} read by zero1"]
    assert_identical(state, results[f"zero{stage}"])
    assert updates == 3
    assert published == [True, True]


@pytest.mark.processes
@pytest.mark.parametrize("engine", ["zero2 fp32", "zero3 fp32", "zero2 bf16"])
def test_a_run_resumed_with_the_same_ranks_and_stage_continues_bit_for_bit(
    engine: str, two_ranks: tuple[Path, Any]
) -> None:
    resumed, uninterrupted = two_ranks[1][f"{engine} goes on"]
    assert_identical(resumed, uninterrupted)


@pytest.mark.processes
def test_ranks_with_different_errors_all_raise_the_error_of_rank_0(two_ranks: tuple[Path, Any]) -> None:
    """Otherwise one rank would look for an earlier checkpoint, and wait there for a rank that has ended."""
    assert two_ranks[1]["errors of two types"] == ["CheckpointError: lost", "CheckpointError: rank 0: lost"]


@pytest.mark.processes
def test_the_ema_of_a_bf16_run_is_kept_in_fp32(two_ranks: tuple[Path, Any]) -> None:
    _, results = two_ranks
    assert len(results["errors of the EMA"]) == 2
    assert max(results["errors of the EMA"]) < 1e-6


@pytest.mark.processes
def test_the_target_encoder_of_a_bf16_run_is_its_ema_rounded_to_bf16(two_ranks: tuple[Path, Any]) -> None:
    _, results = two_ranks
    assert results["bf16 dtypes"] == ["torch.bfloat16"]
    assert results["bf16 published"] == [True, True]
