"""The formulas for state and for bytes sent agree with what engines of all stages hold and send."""

from __future__ import annotations

import csv
import itertools
import json
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.launch import ROOT
from benchmarks.proofs.bytes import formulas, run, small_run, storages
from fastjepa.config import MODEL_SIZES, Config, ModelConfig
from fastjepa.objectives.ijepa.settings import IJEPAConfig
from fastjepa.optim.groups import param_groups
from fastjepa.plan import zero
from tests.support.small import build_ijepa

RESULTS = ROOT / "benchmarks" / "results"


def config_of_model(name: Any) -> Config:
    return Config(model=ModelConfig(name=name, patch_size=14), objective=IJEPAConfig())


@pytest.mark.parametrize("name", sorted(MODEL_SIZES))
def test_parameters_are_those_of_the_objective(name: str) -> None:
    """Group by group and in their order, which decides what part of a parameter a rank's share holds."""
    config = config_of_model(name)
    with torch.device("meta"):
        parts = build_ijepa(config).parts
    counted = zero.parameters_of(config)
    assert [(group.part, group.is_average, list(group.numels)) for group in counted.groups] == [
        (group["part"], bool(group["ema_of"]), [p.numel() for p in group["params"]]) for group in param_groups(parts)
    ]
    numels = {part.name: sum(p.numel() for p in part.module.parameters()) for part in parts}
    assert counted.parts == numels
    assert counted.trained == numels["context_encoder"] + numels["predictor"]
    assert counted.averaged == numels["target_encoder"]
    assert counted.total == sum(numels.values())


@pytest.fixture(scope="module")
def measured() -> list[dict[str, Any]]:
    """Rows of every stage on two ranks, in bf16, with gradient accumulation."""
    return run(2, ["bf16"], [2])


def assert_agree(row: dict[str, Any], formula: int | None) -> None:
    """Bytes agree exactly; but all bytes that are resident have scalars among them, for which 0.5 % is allowed."""
    tolerance = 0.005 if row["quantity"] == "state: resident" else 0.0
    if formula is not None:
        assert int(row["measured"]) == pytest.approx(formula, rel=tolerance, abs=0.0), row


@pytest.mark.processes
def test_bytes_are_those_that_are_sent_and_held(measured: list[dict[str, Any]]) -> None:
    assert {row["stage"] for row in measured} == set(zero.STAGES)
    for row in measured:
        assert_agree(row, row["formula"])


def test_the_recorded_measurements_agree_with_the_formulas_of_today() -> None:
    """benchmarks/results/bytes.csv has every stage on 1, 2 and 4 ranks, both precisions, with and without accumulation."""
    with (RESULTS / "bytes.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    cells = {(row["ranks"], row["stage"], row["precision"], row["grad_accum_steps"]) for row in rows}
    assert cells == set(itertools.product("124", map(str, zero.STAGES), ("fp32", "bf16"), "12"))
    for row in rows:
        stage: Any = row["stage"] if row["stage"] == "torch" else int(row["stage"])
        world = int(row["ranks"])
        config = small_run(row["precision"], int(row["grad_accum_steps"]), world)
        assert_agree(row, formulas(stage, config, world).get(row["quantity"]))


@pytest.mark.processes
def test_the_target_encoder_sends_no_gradients(measured: list[dict[str, Any]]) -> None:
    """At every stage only gradients of trained parameters are sent, though the average is a parameter group like others.

    Its weights are gathered.
    """
    parameters = zero.parameters_of(small_run("bf16", 2, 2))
    trained, everything = parameters.trained, parameters.total
    sent = {(row["stage"], row["quantity"]): row["measured"] for row in measured}
    gradients = {
        "torch": 4 * trained,  # fp32, all-reduced: two ranks send each byte once
        0: 4 * trained,
        1: 2 * trained,
        2: 2 * 2 * trained,  # after each of two micro batches
        3: 2 * trained,  # reduce-scattered: half of it
    }
    for stage, expected in gradients.items():
        assert sent[stage, "sent: gradients"] == pytest.approx(expected, rel=0.001)  # padding
        gathered = sent[stage, "sent: weights"]
        assert gathered == 0 if stage in ("torch", 0) else gathered >= everything  # bf16: half of two bytes each


def test_settings_are_those_of_the_configurations() -> None:
    defaults, folder = zero.ZeroSettings(), ROOT / "configs"
    for stage in (1, 2, 3):
        settings = json.loads((folder / f"zero{stage}.json").read_text(encoding="utf-8"))["zero_optimization"]
        ours = {key: value for key, value in settings.items() if hasattr(defaults, key)}
        assert ours == {key: getattr(defaults, key) for key in ours}
        assert "reduce_bucket_size" in ours


def test_stage_3_shards_all_masters_moments_and_averages() -> None:
    config = config_of_model("vit_huge")
    alone, shared = (zero.state_bytes(config, 3, gpus) for gpus in (1, 256))
    assert shared.masters * 256 == pytest.approx(alone.masters, rel=0.001)
    assert shared.ema * 256 == pytest.approx(alone.ema, rel=0.001)
    parameters = zero.parameters_of(config)
    assert alone.masters == 4 * parameters.trained
    assert alone.moments == 8 * parameters.trained
    assert alone.ema == 4 * parameters.of_part("context_encoder")


@pytest.mark.parametrize(("free", "micro"), [(100.0, 4), (0.5, 0), (2.5, 2), (1e9, 12)])
def test_the_largest_micro_batch_divides_the_share_of_a_rank(free: float, micro: int) -> None:
    assert zero.largest_micro_batch(1.0 if free != 100.0 else 25.0, free, 12) == micro


def test_storages_are_found_of_tensors_that_have_memory_only() -> None:
    real = torch.ones(1000)
    with FakeTensorMode():
        fake = torch.ones(1000)
    meta = torch.ones(1000, device="meta")
    assert storages()[real.untyped_storage().data_ptr()].nbytes() == 4000
    assert 0 not in storages()
    assert fake.shape == meta.shape  # this use keeps both alive until here
