"""The formulas for arithmetic and activations agree with what the real objective computes and keeps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.proofs.bytes import storages
from fastjepa.objectives.ijepa import costs
from fastjepa.objectives.ijepa.block_sizes import MaskConfig
from fastjepa.objectives.ijepa.costs import MaskLengths
from fastjepa.objectives.ijepa.settings import Savings
from fastjepa.objectives.registry import method_of
from tests.support.small import build_ijepa, small_batch, small_config

NO_SAVINGS = Savings(
    gather_before_embed=False, target_last_block=False, predictor_last_block=False, predictor_first_block=False
)


@pytest.mark.parametrize("mode", ["ragged", "official", "budget"])
@pytest.mark.parametrize("predictor_depth", [1, 2])
@pytest.mark.parametrize("savings", [Savings(), NO_SAVINGS])
def test_flops_are_those_that_torch_counts_in_a_step(savings: Savings, predictor_depth: int, mode: Any) -> None:
    """They agree exactly, with attention as plain matrix products.

    Fused attention computes the scores again in the backward pass, which utilisation does not count as work.
    """
    config = small_config(predictor_depth=predictor_depth, savings=savings, masks=MaskConfig(mode=mode, min_keep=2))
    objective, batch = build_ijepa(config), small_batch(config, 16)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        objective(batch).loss.backward()
    formula = costs.step_flops(config, batch.lengths().tokens()) * batch.num_images
    assert formula == pytest.approx(counter.get_total_flops(), rel=1e-12)


def test_flops_for_utilisation_leave_recomputation_out() -> None:
    plain = small_config()
    checkpointed = replace(plain, model=replace(plain.model, activation_checkpointing=True))
    tokens = small_batch(plain).lengths().tokens()
    once = costs.step_flops(plain, tokens)
    assert costs.step_flops(checkpointed, tokens, recomputed=False) == once < costs.step_flops(checkpointed, tokens)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("savings", [Savings(), NO_SAVINGS])
def test_kept_bytes_are_those_of_the_storages_that_live_until_backward(savings: Savings, checkpointing: bool) -> None:
    """They agree within 10 % in fp32.

    Counted are the distinct storages that autograd saves or that live on in Python, parameters aside, up to the loss: its
    path on the CPU keeps more than its kernel on a GPU.
    """
    config = small_config(savings=savings, masks=MaskConfig(mode="budget", min_keep=2))
    config = replace(config, model=replace(config.model, activation_checkpointing=checkpointing))
    objective, batch = build_ijepa(config).train(), small_batch(config, 16)
    before = storages()
    kept: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        if x.is_floating_point():
            kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        features, _ = objective.target_features(batch.images, batch.masks)
        predictions = objective.predictor(objective.context(batch.images, batch.masks), batch.masks)
    after = storages() | {address: x.untyped_storage() for address, x in kept.items()}
    measured = sum(x.nbytes() for address, x in after.items() if address not in before) / batch.num_images
    assert predictions.requires_grad  # this use keeps the graph alive until here
    assert not features.requires_grad
    formula = costs.kept_bytes(config, batch.lengths().tokens(), bf16=False, autocast=False)
    assert formula == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_largest_in_fp32_and_smallest_in_bf16_without_autocast(checkpointing: bool) -> None:
    config = small_config()
    config = replace(config, model=replace(config.model, activation_checkpointing=checkpointing))
    tokens = small_batch(config).lengths().tokens()
    fp32, autocast, bf16 = (
        costs.activation_bytes(config, tokens, bf16=low, autocast=mixed)
        for low, mixed in ((False, False), (True, True), (True, False))
    )
    assert bf16 < autocast < fp32
    assert fp32 > costs.kept_bytes(config, tokens, bf16=False, autocast=False)


def test_the_heaviest_step_is_not_below_the_mean() -> None:
    config = small_config()
    mean, heaviest = method_of(config).typical_tokens()
    assert heaviest.predictor >= mean.predictor
    assert mean.patches == heaviest.patches == config.num_patches


def test_tokens_are_means_per_image_of_the_masks() -> None:
    batch = small_batch(small_config(), 5)
    tokens = MaskLengths.of(batch.masks).tokens()
    assert tokens == batch.lengths().tokens()
    contexts, targets = (x.lengths().tolist() for x in (batch.masks.context_lengths, batch.masks.target_lengths))
    assert tokens.context == pytest.approx(sum(contexts) / 5)
    assert tokens.context_squares == pytest.approx(sum(n**2 for n in contexts) / 5)
    assert tokens.target == pytest.approx(sum(targets) / 5)
    assert 5 * tokens.context == pytest.approx(batch.counts["context_tokens"])
    assert 5 * tokens.target == pytest.approx(batch.counts["target_tokens"])
