"""Weights and EMA of every engine against plain PyTorch: the reduced matrix of benchmarks.proofs.equality."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch

from benchmarks.proofs.equality import (
    FP32_BOUND,
    REDUCED_STEPS,
    STEPS,
    Cell,
    Fault,
    OwnAverage,
    all_cells,
    fault_error,
    full_state,
    plain_trajectory,
    reduced_cells,
    run,
    run_cell,
    schedule,
    wrong_weights,
)
from fastjepa.config.batch_sizes import BatchSizes
from tests.support.small import engine_of


def test_the_reduced_matrix_has_each_value_of_the_whole_one_with_each_engine() -> None:
    assert len(set(all_cells())) == 5 * 2 * 3 * 2 * 2 * 2
    for engine in ("torch", "zero0", "zero1", "zero2", "zero3"):
        mine = [cell for cell in reduced_cells() if cell.engine == engine]
        assert {cell.precision for cell in mine} == {"fp32", "bf16"}
        assert {cell.world for cell in mine} == {1, 2, 4}
        assert {cell.accum for cell in mine} == {1, 4}
        assert {cell.clip for cell in mine} == {cell.checkpointing for cell in mine} == {False, True}


@pytest.mark.processes
def test_every_engine_follows_the_reference(tmp_path: Path) -> None:
    rows = run(reduced_cells(), REDUCED_STEPS, tmp_path)
    assert [row.cell for row in rows if not row.holds] == []
    assert {row.cell for row in rows} == set(reduced_cells())


def test_plain_torch_follows_the_reference_for_the_whole_trajectory(tmp_path: Path) -> None:
    cell = Cell("torch", "fp32", world=1, accum=1, clip=True, checkpointing=True)
    reference = plain_trajectory(replace(cell, checkpointing=False).config())
    assert run_cell(cell, reference, STEPS, tmp_path).holds


@pytest.mark.parametrize("fault", get_args(Fault))
def test_each_injected_mistake_leads_far_from_the_reference(fault: Fault) -> None:
    assert fault_error(fault, REDUCED_STEPS)[0] > 50 * FP32_BOUND


def test_wrong_weights_and_a_wrong_ema_are_detected() -> None:
    config = Cell("torch", "fp32", 1, 1, False, False).config()
    engine = engine_of(config, BatchSizes.share(config, 1), torch.device("cpu"))
    state = full_state(engine)
    assert wrong_weights(engine, state) == 0
    name = "target_encoder.norm.weight"
    state[name] = torch.nextafter(state[name], state[name] + 1)
    assert wrong_weights(engine, state) == 1
    average = OwnAverage(full_state(engine))
    momentum = schedule(config).at(0)["ema_momentum"]
    moved = {n: x * 1.01 if n.startswith("context_encoder") else x for n, x in full_state(engine).items()}
    assert average.error_after(moved, momentum) > 1e-4


def test_recomputation_changes_no_bit_of_a_trajectory() -> None:
    config = Cell("torch", "fp32", 1, 1, True, False).config()
    again = replace(config, model=replace(config.model, activation_checkpointing=True))
    kept, recomputed = (plain_trajectory(c, REDUCED_STEPS).state for c in (config, again))
    assert all(torch.equal(kept[name], recomputed[name]) for name in kept)
