"""fastjepa.costs against the real model, step and DeepSpeed."""

from __future__ import annotations

import csv
import itertools
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.launch import ROOT
from benchmarks.proofs.bytes import formulas, run, small_run, storages
from fastjepa.config import MODEL_SIZES, Config, MaskConfig, ModelConfig, ObjectiveConfig, Savings
from fastjepa.objectives.ijepa import costs
from fastjepa.objectives.ijepa.costs import Lengths, Tokens
from fastjepa.objectives.ijepa.masks import MaskBatch
from fastjepa.objectives.ijepa.objective import IJEPA, build_model
from fastjepa.optim.groups import param_groups
from fastjepa.plan import zero
from tests.support.small import small_batch, small_config

RESULTS = ROOT / "benchmarks" / "results"
NO_SAVINGS = Savings(
    gather_before_embed=False, target_last_block=False, predictor_last_block=False, predictor_first_block=False
)


@pytest.mark.parametrize("name", sorted(MODEL_SIZES))
def test_parameters_are_those_of_the_model(name: Any) -> None:
    config = Config(model=ModelConfig(name=name, patch_size=14))
    with torch.device("meta"):
        model = IJEPA(config)
    counted = {group["name"]: sorted(p.numel() for p in group["params"]) for group in param_groups(model)}
    assert {group: sorted(numels) for group, numels in costs.parameter_sizes(config).items()} == counted


def tokens_of(masks: MaskBatch) -> Tokens:
    return Lengths.of(masks).tokens()


@pytest.mark.parametrize("mode", ["ragged", "official", "budget"])
@pytest.mark.parametrize("predictor_depth", [1, 2])
@pytest.mark.parametrize("savings", [Savings(), NO_SAVINGS])
def test_arithmetic_is_that_of_the_step(savings: Savings, predictor_depth: int, mode: Any) -> None:
    """Exactly what torch's own counter sees in forward and backward pass, with attention as plain matrix products: fused
    attention computes the scores again in the backward pass, which utilisation does not count as work."""
    config = small_config(objective=ObjectiveConfig(savings=savings), masks=MaskConfig(mode=mode, min_keep=2))
    config = replace(config, model=replace(config.model, predictor_depth=predictor_depth))
    model = IJEPA(config)
    images, masks = small_batch(config, 16)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(images, masks).backward()
    formula = costs.flops_per_image(config, tokens_of(masks)) * masks.num_images
    assert formula == pytest.approx(counter.get_total_flops(), rel=1e-12)


def test_utilisation_does_not_count_what_is_computed_twice() -> None:
    plain = small_config()
    lean = replace(plain, model=replace(plain.model, activation_checkpointing=True))
    tokens = tokens_of(small_batch(plain)[1])
    once = costs.flops_per_image(plain, tokens)
    assert costs.flops_per_image(lean, tokens, recomputed=False) == once < costs.flops_per_image(lean, tokens)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("savings", [Savings(), NO_SAVINGS])
def test_activations_are_those_that_are_kept_for_backward(savings: Savings, checkpointing: bool) -> None:
    """In fp32: the distinct storages that autograd saves or that live on in Python, parameters aside. Bound: 10 %.

    Up to the loss, whose path for the CPU keeps more than its kernel.
    """
    config = small_config(objective=ObjectiveConfig(savings=savings), masks=MaskConfig(mode="budget", min_keep=2))
    config = replace(config, model=replace(config.model, activation_checkpointing=checkpointing))
    model = IJEPA(config).train()
    images, masks = small_batch(config, 16)
    before = storages()
    kept: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        if x.is_floating_point():
            kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        features, _ = model.target_features(images, masks)
        predictions = model.predictor(model.context(images, masks), masks)
    after = storages() | {address: x.untyped_storage() for address, x in kept.items()}
    measured = sum(x.nbytes() for address, x in after.items() if address not in before) / masks.num_images
    assert predictions.requires_grad  # alive until here, and with them the graph
    assert not features.requires_grad
    formula = costs.kept_bytes(config, tokens_of(masks), 2, bf16=False)
    assert formula == pytest.approx(measured, rel=0.1)


@pytest.fixture(scope="module")
def measured() -> list[dict[str, Any]]:
    """Every stage on two ranks, in bf16, with gradient accumulation."""
    return run(2, ["bf16"], [2])


def assert_agree(row: dict[str, Any], formula: int | None) -> None:
    """To the byte; all that is resident to within scalars."""
    slack = 0.005 if row["quantity"] == "state: resident" else 0.0
    if formula is not None:
        assert int(row["measured"]) == pytest.approx(formula, rel=slack, abs=0.0), row


def test_bytes_are_those_that_are_sent_and_held(measured: list[dict[str, Any]]) -> None:
    assert {row["stage"] for row in measured} == set(costs.STAGES)
    for row in measured:
        assert_agree(row, row["formula"])


def test_what_was_measured_of_all_agrees_with_the_formulas_of_today() -> None:
    """benchmarks/results/bytes.csv: every stage, 1, 2 and 4 ranks, both precisions, with and without accumulation."""
    with (RESULTS / "bytes.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    cells = {(row["ranks"], row["stage"], row["precision"], row["grad_accum_steps"]) for row in rows}
    assert cells == set(itertools.product("124", map(str, costs.STAGES), ("fp32", "bf16"), "12"))
    for row in rows:
        stage: Any = row["stage"] if row["stage"] == "torch" else int(row["stage"])
        world = int(row["ranks"])
        config = small_run(row["precision"], int(row["grad_accum_steps"]), world)
        assert_agree(row, formulas(stage, config, world).get(row["quantity"]))


def test_the_target_encoder_sends_no_gradients(measured: list[dict[str, Any]]) -> None:
    """In no stage, though it is a parameter group as the others: only what is trained is sent. Its weights are gathered."""
    model = build_model(small_run("bf16", 2, 2))
    trained = sum(p.numel() for p in model.trained_parameters())
    everything = sum(p.numel() for p in model.parameters())
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


def test_stage_3_shards_everything_but_what_is_small() -> None:
    config = Config(model=ModelConfig(name="vit_huge", patch_size=14))
    alone, shared = (zero.state_bytes(config, 3, gpus) for gpus in (1, 256))
    assert shared.masters * 256 == pytest.approx(alone.masters, rel=0.001)
    assert shared.ema * 256 == pytest.approx(alone.ema, rel=0.001)
    encoder, predictor = costs.count_parameters(config)
    assert alone.masters == 4 * (encoder + predictor)
    assert alone.moments == 8 * (encoder + predictor)
    assert alone.ema == 4 * encoder


@pytest.mark.parametrize(("free", "micro"), [(100.0, 4), (0.5, 0), (2.5, 2), (1e9, 12)])
def test_micro_batch_divides_the_share(free: float, micro: int) -> None:
    assert zero.largest_micro_batch(1.0 if free != 100.0 else 25.0, free, 12) == micro


def test_storages_are_those_of_tensors_that_have_memory() -> None:
    real = torch.ones(1000)
    with FakeTensorMode():
        fake = torch.ones(1000)
    meta = torch.ones(1000, device="meta")
    assert storages()[real.untyped_storage().data_ptr()].nbytes() == 4000
    assert 0 not in storages()
    assert fake.shape == meta.shape  # alive until here
