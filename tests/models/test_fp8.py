"""target_precision=fp8, on a CPU: PyTorch computes products of e4m3 there too. Only a GPU can show that they are fast."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastjepa_kernels
from fastjepa.config import Config, ModelConfig
from fastjepa.config.batch_sizes import BatchSizes
from fastjepa.engine.compilation import compile_blocks
from fastjepa.errors import ConfigError
from fastjepa.models.fp8 import check_fp8, fp8_linear, quantise, use_fp8
from fastjepa.models.layers import Linear
from fastjepa.objectives.ijepa.settings import IJEPAConfig
from fastjepa_kernels import Ragged
from tests.support.small import build_ijepa, engine_of, small_batch, small_config


@pytest.fixture
def x() -> Tensor:
    """Rows from 1e-6 to 1e6, one of them zero, with elements far below the smallest number of e4m3 beside large ones."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(37, 64, generator=generator) * torch.logspace(-6, 6, 37)[:, None]
    x[:, 1] *= 1e-4
    x[5] = 0
    return x


def test_an_element_is_rounded_by_at_most_half_a_step(x: Tensor) -> None:
    x8, scale = quantise(x)
    assert x8.float().isfinite().all()
    error = (x8.double() * scale.double() - x.double()).abs()
    # A step is 2^-3 of the leading bit, but 2^-9, the smallest number, below 2^-6. The last factor is for fp32's x / scale.
    assert (error <= torch.maximum(x.double().abs() * 2**-4, scale.double() * 2**-10) * (1 + 1e-6)).all()
    assert (x8.float().abs().amax(1)[x.any(1)] == 448).all()


def test_a_product_equals_that_of_the_rounded_factors_in_fp64(x: Tensor) -> None:
    generator = torch.Generator().manual_seed(1)
    weight, bias = torch.randn(48, 64, generator=generator), torch.randn(48, generator=generator)
    exact_x, exact_weight = (q.double() * scale.double() for q, scale in (quantise(x), quantise(weight)))
    expected = exact_x @ exact_weight.t() + bias.bfloat16()
    result = fp8_linear(x, weight, bias)
    assert result.dtype == torch.bfloat16
    # The bound allows for the rounding of the result and for that of sums in fp32, in which terms cancel.
    bound = expected.abs() * 2**-8 + exact_x.abs() @ exact_weight.abs().t() * 64 * 2**-24
    assert ((result.double() - expected).abs() <= bound + 1e-6).all()


@torch.no_grad()
def targets(precision: str) -> Tensor:
    """Normalised features of one image by the target encoder of a new vit_small."""
    config = Config(model=ModelConfig(name="vit_small"), objective=IJEPAConfig())
    encoder = build_ijepa(config).target_encoder
    if precision == "fp8":
        use_fp8(encoder)
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16, enabled=precision != "fp32"):
        features = encoder(images)
    return F.layer_norm(features.float(), features.shape[-1:])


def test_targets_move_by_less_than_5_percent() -> None:
    """README states the figure. In bf16 the targets move by 0.3 %."""
    exact = targets("fp32")
    half, fp8 = (float((targets(precision) - exact).norm() / exact.norm()) for precision in ("bf16", "fp8"))
    assert 0.001 < half < 0.005
    assert 0.02 < fp8 < 0.05


@torch.no_grad()
def test_a_compiled_encoder_in_fp8_gives_the_same_bits() -> None:
    model = ModelConfig(patch_size=4, embed_dim=32, depth=2, num_heads=2)
    encoder = build_ijepa(small_config(model=model, predictor_embed_dim=16, predictor_depth=1)).target_encoder
    use_fp8(encoder)
    fastjepa_kernels.request({"block_attention": "padded"})
    try:
        tokens, lengths = torch.randn(12, 32), Ragged.uniform(3, 4)
        expected = encoder.encode(tokens, lengths)
        compile_blocks(encoder, "aot_eager")
        assert torch.equal(encoder.encode(tokens, lengths), expected)
    finally:
        fastjepa_kernels.request({})


def test_only_the_target_encoder_multiplies_in_fp8() -> None:
    objective = build_ijepa(small_config())
    use_fp8(objective.target_encoder)
    layers = {name: module for name, module in objective.named_modules() if isinstance(module, Linear)}
    in_fp8 = {name for name, layer in layers.items() if layer._product is fp8_linear}
    assert in_fp8 == {name for name in layers if name.startswith("target_encoder.")}
    assert len(in_fp8) == 3 * 4


def test_a_machine_without_fp8_is_refused_with_what_was_expected_and_found() -> None:
    config = small_config(target_precision="fp8", precision="bf16")
    with pytest.raises(ConfigError) as raised:
        engine_of(config, BatchSizes.share(config, 1), torch.device("cpu"))
    assert str(raised.value) == (
        "target_precision = fp8: expected a GPU of compute capability 8.9 or newer (Ada, Hopper, Blackwell), found a cpu; "
        "use target_precision=same"
    )


@pytest.mark.parametrize(
    ("capability", "dtype", "message"),
    [
        ((8, 0), torch.bfloat16, "8.9 or newer (Ada, Hopper, Blackwell), found an A100 with 8.0; use"),
        ((9, 0), torch.float32, "precision = bf16, found float32; use"),
        ((9, 0), torch.bfloat16, "widths of the encoder that are multiples of 16, found (24, 96); use"),
    ],
)
def test_a_capability_dtype_or_width_that_fp8_cannot_use_is_refused(
    capability: tuple[int, int], dtype: torch.dtype, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an A100")
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_fp8(small_config(target_precision="fp8"), torch.device("cuda"), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("compile", ["none", "blocks"])
def test_on_a_gpu_losses_with_targets_in_fp8_follow_those_in_bf16(compile: str) -> None:
    device = torch.device("cuda")
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs compute capability 8.9")
    model = ModelConfig(patch_size=4, embed_dim=32, depth=2, num_heads=2)
    settings = {
        "model": model,
        "predictor_embed_dim": 16,
        "predictor_depth": 1,
        "precision": "bf16",
        "compile": compile,
    }
    losses = []
    for target_precision in ("same", "fp8"):
        config = small_config(**settings, target_precision=target_precision)  # type: ignore[arg-type]
        engine = engine_of(config, BatchSizes.share(config, 1), device)
        batches = [small_batch(config, 4, step=step).to(device) for step in range(20)]
        losses.append(torch.stack([engine.micro_step(batch).loss for batch in batches]))
    torch.testing.assert_close(*losses, rtol=0.1, atol=0)
