"""The objective equals a second, plain implementation, and every saving equals the computation without it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastjepa.config import Config
from fastjepa.objectives.ijepa.block_sizes import MaskConfig
from fastjepa.objectives.ijepa.masks import MaskBatch
from fastjepa.objectives.ijepa.objective import IJEPAObjective, MaskedImages
from fastjepa.objectives.ijepa.settings import IJEPAConfig, Savings
from fastjepa_kernels import Ragged
from tests.support import plain_ijepa
from tests.support.small import build_ijepa, small_batch, small_config

SAVINGS = ["gather_before_embed", "target_last_block", "predictor_last_block", "predictor_first_block"]


def perturbed(config: Config) -> IJEPAObjective:
    """The objective in fp64, with noise on all parameters: none is 0 or 1, and the two encoders differ."""
    objective = build_ijepa(config).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return objective


def patch_lists(masks: MaskBatch) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Per image the context patches; per image and target block the target patches."""
    contexts = (masks.context_indices % masks.num_patches).split(masks.context_lengths.lengths().tolist())
    blocks = (masks.target_indices % masks.num_patches).split(masks.target_lengths.lengths().tolist())
    per_image = len(blocks) // masks.num_images
    return list(contexts), [list(blocks[i * per_image : (i + 1) * per_image]) for i in range(masks.num_images)]


@pytest.mark.parametrize("mode", ["ragged", "official", "budget"])
@pytest.mark.parametrize(("kind", "normalize"), [("smooth_l1", True), ("l2", False)])
def test_loss_and_gradients_equal_the_plain_implementation(mode: Any, kind: Any, normalize: bool) -> None:
    config = small_config(masks=MaskConfig(mode=mode, min_keep=2), loss=kind, normalize_targets=normalize)
    objective, settings = perturbed(config), IJEPAConfig.of(config)
    batch = small_batch(config, dtype=torch.float64)

    loss = objective(batch).loss
    weights = {**dict(objective.named_parameters()), **dict(objective.named_buffers())}
    size = config.model.size
    expected = plain_ijepa.loss(
        batch.images,
        *patch_lists(batch.masks),
        weights,
        heads=size.num_heads,
        depth=size.depth,
        predictor_depth=settings.depth_of_predictor(config.model.name),
        patch=config.model.patch_size,
        kind=kind,
        normalize=normalize,
    )
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-10)
    parameters = objective.trained_parameters()
    for gradient, plain in zip(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(gradient, plain, rtol=0, atol=1e-10)


@pytest.mark.parametrize("strategy", ["multiblock", "rasterized"])
@pytest.mark.parametrize("saving", SAVINGS)
def test_a_saving_changes_neither_outputs_nor_gradients(saving: str, strategy: Any) -> None:
    masks = MaskConfig(min_keep=2, strategy=strategy, num_target_blocks=4 if strategy == "multiblock" else 3)
    config = small_config(masks=masks)
    without = small_config(masks=masks, savings=Savings(**{saving: False}))
    assert getattr(IJEPAConfig.of(config).savings, saving), "on by default"
    batch = small_batch(config, dtype=torch.float64)

    results = []
    for each in (config, without):
        objective = perturbed(each)
        predictions = objective.predictor(objective.context(batch.images, batch.masks), batch.masks)
        features, rows = objective.target_features(batch.images, batch.masks)
        loss = objective.loss(predictions, features, rows)
        gradients = torch.autograd.grad(loss, objective.trained_parameters())
        results.append((predictions, features[rows], loss, gradients))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-10)


def test_the_target_encoder_starts_as_a_copy_and_never_gets_a_gradient() -> None:
    config = small_config()
    objective = build_ijepa(config)
    for target, source in zip(
        objective.target_encoder.parameters(), objective.context_encoder.parameters(), strict=True
    ):
        assert torch.equal(target, source)
        assert target.data_ptr() != source.data_ptr()
    objective(small_batch(config)).loss.backward()
    assert all(p.grad is None for p in objective.target_encoder.parameters())
    assert all(p.grad is not None and p.grad.any() for p in objective.trained_parameters())


def test_every_parameter_belongs_to_one_part_and_averages_follow_what_they_average() -> None:
    objective = build_ijepa(small_config())
    assert [(part.name, part.averages) for part in objective.parts] == [
        ("context_encoder", None),
        ("predictor", None),
        ("target_encoder", "context_encoder"),
    ]
    assert all(objective.part(part.name) is part.module for part in objective.parts)
    of_parts = [f"{part.name}.{name}" for part in objective.parts for name, _ in part.module.named_parameters()]
    assert sorted(of_parts) == sorted(name for name, _ in objective.named_parameters())
    target_encoder = {*objective.target_encoder.parameters()}
    trained = objective.trained_parameters()
    assert target_encoder.isdisjoint(trained)
    assert len(trained) + len(target_encoder) == len(of_parts)


def test_slices_have_the_loss_of_the_whole_and_their_share_of_the_target_tokens() -> None:
    config = small_config()
    objective, batch = perturbed(config), small_batch(config, 5, dtype=torch.float64)
    slices = list(batch.slices(2))
    assert [part.num_images for part, _ in slices] == [2, 2, 1]
    assert sum(share for _, share in slices) == pytest.approx(1)
    for name in ("context_tokens", "target_tokens"):
        assert sum(part.counts[name] for part, _ in slices) == batch.counts[name]
    summed = sum(share * objective(part).loss for part, share in slices)
    torch.testing.assert_close(summed, objective(batch).loss, rtol=0, atol=1e-10)


def test_the_forward_pass_reads_the_listed_tensors_only() -> None:
    """CUDA graphs replay the listed ones. The union of target blocks varies in size; they go without its saving."""
    config = small_config(savings=Savings(target_last_block=False))
    objective, batch = perturbed(config), small_batch(config, dtype=torch.float64)
    other = small_batch(config, dtype=torch.float64, step=1)
    unlisted = {"union_indices", "union_lengths", "union_rows"}
    changed = replace(batch.masks, **{name: getattr(other.masks, name) for name in unlisted})
    assert torch.equal(objective(batch).loss, objective(MaskedImages(batch.images, changed)).loss)

    fields = [value for name, value in vars(batch.masks).items() if name not in unlisted]
    held = [batch.images, *(x.cu_seqlens if isinstance(x, Ragged) else x for x in fields if not isinstance(x, int))]
    assert {x.data_ptr() for x in batch.tensors()} == {x.data_ptr() for x in held}


def test_replacing_an_image_changes_the_predictions_of_that_image_only() -> None:
    config = small_config()
    objective = perturbed(config)
    batch = small_batch(config, dtype=torch.float64)
    changed = batch.images.clone()
    changed[1] += 1
    image_of_row = batch.masks.target_indices // batch.masks.num_patches
    outputs = [objective.predictor(objective.context(x, batch.masks), batch.masks) for x in (batch.images, changed)]
    differs = (outputs[0] - outputs[1]).abs().amax(1) > 1e-9
    assert torch.equal(differs, image_of_row == 1)
