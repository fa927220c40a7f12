"""A micro batch in slices gives the loss and the gradients of the whole one."""

import pytest
import torch

from fastjepa.engine import slices
from fastjepa.objectives.base import Output, Prepared
from fastjepa.objectives.ijepa.block_sizes import MaskConfig
from fastjepa.objectives.registry import method_of
from tests.support.small import build_ijepa, small_batch, small_config

IMAGES = 5


@pytest.mark.parametrize("mode", ["ragged", "official", "budget"])
@pytest.mark.parametrize("per_slice", [1, 2, 3, 5])
def test_loss_and_gradients_are_those_of_the_whole_batch(
    mode: str, per_slice: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(masks=MaskConfig(mode=mode, min_keep=2))  # type: ignore[arg-type]
    model = build_ijepa(config).double()
    batch = small_batch(config, IMAGES, dtype=torch.float64)
    model(batch).loss.backward()
    expected = [p.grad.clone() for p in model.trained_parameters() if p.grad is not None]
    whole = model(batch).loss.detach()
    model.zero_grad()

    taken = []

    def forward_and_backward(part: Prepared, share: float) -> Output:
        assert len(part.tensors()[0]) == part.num_images
        taken.append(part.num_images)
        loss: torch.Tensor = model(part).loss
        (loss * share).backward()
        return Output(loss.detach(), {"loss again": loss.detach()}, {"losses": loss.detach().expand(2)})

    method = method_of(config)
    monkeypatch.setattr(method, "activation_bytes", lambda *a, **k: slices._ACTIVATIONS / per_slice)
    loss, signals, statistics = slices.SlicedPasses(forward_and_backward, method, bf16=False)(batch)
    assert sum(taken) == IMAGES
    assert len(taken) == round(IMAGES / per_slice)
    torch.testing.assert_close(loss.double(), whole, rtol=1e-6, atol=0)  # the sum of losses is kept in fp32
    torch.testing.assert_close(signals["loss again"], whole)
    torch.testing.assert_close(statistics["losses"], whole.expand(2))
    for p, grad in zip([p for p in model.trained_parameters() if p.grad is not None], expected, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=0, atol=1e-12)
