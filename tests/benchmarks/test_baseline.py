"""benchmarks.baseline trains as fastjepa does: the same loss and gradients, and the same weights and EMA after steps."""

import sys

import pytest
import torch

from benchmarks.baseline import Baseline, BaselineIJEPA
from fastjepa.config import OptimConfig
from fastjepa.config.batch_sizes import BatchSizes
from fastjepa.engine import slices
from fastjepa.objectives.ijepa.block_sizes import MaskConfig
from tests.support.small import build_ijepa, engine_of, small_batch, small_config


@pytest.mark.parametrize("mode", ["official", "ragged"])
def test_same_loss_and_gradients(mode: str) -> None:
    config = small_config(masks=MaskConfig(mode=mode, min_keep=2))  # type: ignore[arg-type]
    model = build_ijepa(config).double()
    plain = BaselineIJEPA(config).double()
    plain.load_state_dict(model.state_dict())
    batch = small_batch(config, dtype=torch.float64)
    mine, theirs = model(batch).loss, plain(batch.images, batch.masks)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)
    mine.backward()
    theirs.backward()
    gradients = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    names = {name for name, p in model.named_parameters() if p.grad is not None}
    assert names == set(gradients)
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, gradients[name], rtol=0, atol=1e-10)


@pytest.mark.parametrize("whole_batch", [True, False])
def test_same_weights_and_ema_after_steps(whole_batch: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """If not `whole_batch`, the engine computes as for large batches: one image at a time, with products by oneDNN.

    The settings make weight decay and EMA show within three steps.
    """
    if not whole_batch:
        monkeypatch.setattr(slices, "_ACTIVATIONS", 1)
        monkeypatch.setattr(sys.modules["fastjepa_kernels.linear"], "_SMALL", 0)
    optim = OptimConfig(warmup_epochs=0, weight_decay=1.0, ema_momentum=(0.5, 1.0))
    config = small_config(masks=MaskConfig(mode="official", min_keep=2), optim=optim)
    engine = engine_of(config, BatchSizes.share(config, 1), torch.device("cpu"))
    plain = BaselineIJEPA(config)
    plain.load_state_dict(engine.model.state_dict())
    baseline = Baseline(plain, config)
    batch = small_batch(config)
    for _ in range(3):
        for group in engine.param_groups:
            group["lr"], group["ema_momentum"] = config.optim.lr, config.optim.ema_momentum[0]
            group["weight_decay"] = 0.0 if "no_decay" in group["name"] else config.optim.weight_decay
        mine, theirs = engine.micro_step(batch).loss, baseline.step(batch.images, batch.masks)
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=0)
    expected = dict(plain.named_parameters())
    for name, p in engine.model.named_parameters():
        a, b = p.detach(), expected[name].detach()
        if name.endswith("qkv.bias"):  # leave out the keys' bias: its gradient is only rounding, which AdamW enlarges
            a, b = (x.view(3, -1)[::2] for x in (a, b))
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5)
