"""A whole training step on the Triton kernels against the same step on PyTorch."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import fastjepa_kernels
from fastjepa.config import Config, ModelConfig
from fastjepa.config.batch_sizes import BatchSizes
from fastjepa.engine.compilation import compile_blocks
from fastjepa.engine.torch_engine import TorchEngine
from fastjepa.objectives.ijepa.block_sizes import MaskConfig
from fastjepa.objectives.ijepa.masks import MaskBatch, sample_masks
from fastjepa.objectives.ijepa.objective import MaskedImages
from fastjepa.objectives.ijepa.settings import IJEPAConfig
from fastjepa.objectives.registry import method_of
from fastjepa.optim.schedule import Schedule, set_schedule
from tests.kernels.triton.conftest import Engine
from tests.support.small import build_ijepa, small_batch, small_config

ON_TORCH = {
    "masked_gather": "torch",
    "block_attention": "padded",
    "adamw_ema": "torch",
    "mask_sampling": "torch",
    "target_loss": "torch",
}


@pytest.fixture(autouse=True)
def no_requests() -> Iterator[None]:
    yield
    fastjepa_kernels.request({})


def _config() -> Config:
    """The smallest model that has both kinds of block: full ones, and a last one with fewer queries than keys."""
    return small_config(
        image_size=16,
        masks=MaskConfig(min_keep=2, num_target_blocks=2),
        model=ModelConfig(patch_size=4, embed_dim=16, depth=2, num_heads=2, init="fan_in"),
        predictor_embed_dim=16,
        predictor_depth=2,
        global_batch_size=2,
        precision="fp32",
    )


def _step(config: Config, device: torch.device) -> tuple[MaskBatch, Tensor, dict[str, Tensor]]:
    """Masks and loss of one optimizer step, and the weights after it (the target encoder's too)."""
    images = small_batch(config, config.global_batch_size).images
    indices = torch.arange(config.global_batch_size, device=device)
    masks = sample_masks(
        IJEPAConfig.of(config).masks, config.grid_h, config.grid_w, seed=1, step=0, sample_indices=indices
    )
    engine = TorchEngine(build_ijepa(config), method_of(config), config, BatchSizes.share(config, 1), device)
    set_schedule(engine.param_groups, Schedule(config.optim, steps_per_epoch=2, total_steps=2).at(0))
    loss = engine.micro_step(MaskedImages(images.to(device), masks)).loss
    return masks, loss, {name: p.detach() for name, p in engine.model.named_parameters()}


def test_a_step_on_triton_equals_a_step_on_pytorch(engine: Engine) -> None:
    config = _config()
    fastjepa_kernels.request(ON_TORCH)
    plain_masks, plain_loss, plain_weights = _step(config, engine.device)
    fastjepa_kernels.request(dict.fromkeys(ON_TORCH, "triton"))
    masks, loss, weights = _step(config, engine.device)

    assert torch.equal(masks.predictor_rows, plain_masks.predictor_rows)
    torch.testing.assert_close(loss, plain_loss, rtol=1e-5, atol=0)
    # Adam's first step is nearly lr * sign(gradient): where a gradient is next to 0, its rounding decides the sign.
    lr = config.optim.lr
    for name, weight in weights.items():
        if name.endswith("attn.qkv.bias"):  # the gradient of a key's bias is nothing but rounding
            continue
        moved = (weight - plain_weights[name]).abs()
        assert (moved > 0.02 * lr).float().mean() < 0.01, name


def test_a_compiled_step_on_triton_gives_the_same_bits(engine: Engine) -> None:
    """The kernels are opaque in the graphs, so they do not break them, and batches of other lengths need no new graph."""
    config = _config()
    fastjepa_kernels.request(dict.fromkeys(ON_TORCH, "triton"))
    plain, compiled = (build_ijepa(config).to(engine.device) for _ in range(2))
    compile_blocks(compiled, "aot_eager")
    for step in range(2):
        batch = small_batch(config, 2, step=step).to(engine.device)
        results = []
        for model in (plain, compiled):
            with torch.compiler.set_stance("fail_on_recompile" if step else "default"):
                loss = model(batch).loss
            results.append([loss.detach(), *torch.autograd.grad(loss, model.trained_parameters())])
        assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
