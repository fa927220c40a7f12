"""The objective against a second, plain implementation; and every saving against the plain computation."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastjepa.config import Config, MaskConfig, ObjectiveConfig, Savings
from fastjepa.objectives.ijepa.masks import MaskBatch
from fastjepa.objectives.ijepa.objective import IJEPA, build_model
from tests.support import plain_ijepa
from tests.support.small import small_batch, small_config

SAVINGS = ["gather_before_embed", "target_last_block", "predictor_last_block", "predictor_first_block"]


def _model(config: Config) -> IJEPA:
    """In fp64, with a target encoder that differs from the context encoder and parameters that are nowhere 0 or 1."""
    model = build_model(config).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def _lists(masks: MaskBatch) -> tuple[list[Tensor], list[list[Tensor]]]:
    positions = (masks.context_indices % masks.num_patches).split(masks.context.lengths().tolist())
    blocks = (masks.target_indices % masks.num_patches).split(masks.target.lengths().tolist())
    per_image = len(blocks) // masks.num_images
    return list(positions), [list(blocks[i * per_image : (i + 1) * per_image]) for i in range(masks.num_images)]


@pytest.mark.parametrize("mode", ["ragged", "official", "budget"])
@pytest.mark.parametrize(("kind", "normalize"), [("smooth_l1", True), ("l2", False)])
def test_loss_and_gradients_equal_the_plain_implementation(mode: str, kind: str, normalize: bool) -> None:
    masks_config = MaskConfig(mode=mode, min_keep=2)  # type: ignore[arg-type]
    objective = ObjectiveConfig(loss=kind, normalize_targets=normalize)  # type: ignore[arg-type]
    config = small_config(masks=masks_config, objective=objective)
    model = _model(config)
    images, masks = small_batch(config, dtype=torch.float64)

    loss = model(images, masks)
    weights = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    size = config.model.size
    expected = plain_ijepa.loss(
        images,
        *_lists(masks),
        weights,
        heads=size.num_heads,
        depth=size.depth,
        predictor_depth=size.predictor_depth,
        patch=config.model.patch_size,
        kind=kind,
        normalize=normalize,
    )
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-10)
    parameters = model.trained_parameters()
    for mine, plain in zip(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(mine, plain, rtol=0, atol=1e-10)


@pytest.mark.parametrize("strategy", ["multiblock", "rasterized"])
@pytest.mark.parametrize("saving", SAVINGS)
def test_a_saving_changes_neither_outputs_nor_gradients(saving: str, strategy: str) -> None:
    masks_config = MaskConfig(min_keep=2, strategy=strategy, num_target_blocks=4 if strategy == "multiblock" else 3)  # type: ignore[arg-type]
    config = small_config(masks=masks_config)
    plain = small_config(masks=masks_config, objective=ObjectiveConfig(savings=Savings(**{saving: False})))
    assert getattr(config.objective.savings, saving), "on by default"
    images, masks = small_batch(config, dtype=torch.float64)

    results = []
    for each in (config, plain):
        model = _model(each)
        predictions = model.predictor(model.context(images, masks), masks)
        features, rows = model.target_features(images, masks)
        loss = model.loss(predictions, features, rows)
        results.append((predictions, features[rows], loss, torch.autograd.grad(loss, model.trained_parameters())))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-10)


def test_savings_hold_in_a_predictor_of_one_block() -> None:
    """The first block is then the last one too."""
    config = small_config()
    config = replace(config, model=replace(config.model, predictor_depth=1))
    off = Savings(predictor_last_block=False, predictor_first_block=False)
    plain = replace(config, objective=ObjectiveConfig(savings=off))
    images, masks = small_batch(config, dtype=torch.float64)
    losses = [_model(each)(images, masks) for each in (config, plain)]
    torch.testing.assert_close(*losses, rtol=0, atol=1e-10)


def test_the_target_encoder_starts_as_a_copy_and_never_gets_a_gradient() -> None:
    config = small_config()
    model = build_model(config)
    for target, source in zip(model.target_encoder.parameters(), model.context_encoder.parameters(), strict=True):
        assert torch.equal(target, source)
        assert target.data_ptr() != source.data_ptr()
    model(*small_batch(config)).backward()
    assert all(p.grad is None for p in model.target_encoder.parameters())
    assert all(p.grad is not None and p.grad.any() for p in model.trained_parameters())


def test_an_image_does_not_see_its_neighbours_in_the_batch() -> None:
    """Replacing the second image changes the predictions of the second image only."""
    config = small_config()
    model = _model(config)
    images, masks = small_batch(config, dtype=torch.float64)
    changed = images.clone()
    changed[1] += 1
    rows = masks.target_indices // masks.num_patches
    outputs = [model.predictor(model.context(x, masks), masks) for x in (images, changed)]
    moved = (outputs[0] - outputs[1]).abs().amax(1) > 1e-9
    assert torch.equal(moved, rows == 1)


def test_the_initial_weights_are_a_function_of_the_seed_alone() -> None:
    first = build_model(small_config())
    torch.manual_seed(99)
    second, other = build_model(small_config()), build_model(small_config(seed=1))
    name = "blocks.0.attn.qkv.weight"
    assert torch.equal(first.context_encoder.state_dict()[name], second.context_encoder.state_dict()[name])
    assert not torch.equal(first.context_encoder.state_dict()[name], other.context_encoder.state_dict()[name])
