"""A micro batch in slices: the same loss and gradients as whole."""

import pytest
import torch

from fastjepa.config import MaskConfig
from fastjepa.engine import slices
from fastjepa.objectives.ijepa.masks import MaskBatch
from fastjepa.objectives.ijepa.objective import build_model
from tests.support.small import small_batch, small_config

IMAGES = 5


@pytest.mark.parametrize("mode", ["ragged", "official", "budget"])
@pytest.mark.parametrize("per_slice", [1, 2, 3, 5])
def test_loss_and_gradients_are_those_of_the_whole_batch(
    mode: str, per_slice: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(masks=MaskConfig(mode=mode, min_keep=2))  # type: ignore[arg-type]
    model = build_model(config).double()
    images, masks = small_batch(config, IMAGES, dtype=torch.float64)
    model(images, masks).backward()
    expected = [p.grad.clone() for p in model.trained_parameters() if p.grad is not None]
    whole = model(images, masks).detach()
    model.zero_grad()

    taken = []

    def forward_and_backward(part: torch.Tensor, part_masks: MaskBatch, share: float) -> torch.Tensor:
        assert len(part) == part_masks.num_images
        taken.append(len(part))
        loss: torch.Tensor = model(part, part_masks)
        (loss * share).backward()
        return loss.detach()

    monkeypatch.setattr(
        "fastjepa.objectives.ijepa.costs.activation_bytes", lambda *a, **k: slices._ACTIVATIONS / per_slice
    )
    loss = slices.SlicedPasses(forward_and_backward, config, bf16=False)(images, masks)
    assert sum(taken) == len(images)
    assert len(taken) == round(len(images) / per_slice)
    torch.testing.assert_close(loss.double(), whole, rtol=1e-6, atol=0)  # the sum of losses is kept in fp32
    for p, grad in zip([p for p in model.trained_parameters() if p.grad is not None], expected, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=0, atol=1e-12)
