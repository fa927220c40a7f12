"""Matrix products of the target encoder's blocks in 8-bit floats, for GPUs of compute capability 8.9 and newer.

    x ~ x8 * scale_x,  scale_x[t] = max_k |x[t, k]| / 448       for every token t
    w ~ w8 * scale_w,  scale_w[n] = max_k |w[n, k]| / 448       for every output channel n
    x w^T ~ (x8 w8^T) * scale_x[t] * scale_w[n]                 products of e4m3, sums in fp32, the result in bf16

e4m3 stores 3 mantissa bits: a factor is rounded by up to 2^-4 of its value. Only the target encoder uses fp8, because it has
no backward pass, which would need a second format and transposed copies. Its weights are quantised again in every forward
pass: one pass over data that the product reads anyway, against 2 * N operations on each weight for every image of N patches.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import ScalingType

from fastjepa.config import Config
from fastjepa.errors import ConfigError
from fastjepa.models.layers import Block, Linear

_E4M3_MAX = 448.0
"""The largest finite number in e4m3."""


def use_fp8(encoder: nn.Module) -> None:
    """Make the linear layers in the encoder's Blocks multiply in fp8 from now on. They can no longer compute gradients."""
    for block in encoder.modules():
        if isinstance(block, Block):
            for module in block.modules():
                if isinstance(module, Linear):
                    module.compute_with(product=fp8_linear)


def fp8_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute x weight^T + bias: x [T, K], weight [N, K], bias [N], all floating -> bf16 [T, N]. K, N: multiples of 16."""
    x8, x_scale = quantise(x)
    w8, w_scale = quantise(weight)
    recipe = ScalingType.RowWise
    return F.scaled_mm(x8, w8.t(), x_scale, recipe, w_scale.t(), recipe, bias=bias.bfloat16(), use_fast_accum=True)


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise each row of x [R, K]: return e4m3 [R, K] and scales, fp32 [R, 1], whose product is about x."""
    x = x.float()
    scale = x.abs().amax(1, keepdim=True).clamp(min=1e-30) / _E4M3_MAX
    return (x / scale).to(torch.float8_e4m3fn), scale


def check_fp8(config: Config, device: torch.device, dtype: torch.dtype) -> None:
    """Check that target_precision = fp8 can run here.

    Raises:
        ConfigError: the GPU, the precision or the encoder's widths do not allow it.
    """

    def expect(ok: bool, expected: str, found: str) -> None:
        if not ok:
            raise ConfigError(f"target_precision = fp8: expected {expected}, found {found}; use target_precision=same")

    gpu = device.type == "cuda"
    capability = torch.cuda.get_device_capability(device) if gpu else (0, 0)
    found = f"{torch.cuda.get_device_name(device)} with {capability[0]}.{capability[1]}" if gpu else f"a {device.type}"
    expect(capability >= (8, 9), "a GPU of compute capability 8.9 or newer (Ada, Hopper, Blackwell)", found)
    expect(dtype == torch.bfloat16, "precision = bf16", str(dtype).removeprefix("torch."))
    size = config.model.size
    widths = (size.embed_dim, round(size.embed_dim * size.mlp_ratio))
    expect(all(width % 16 == 0 for width in widths), "widths of the encoder that are multiples of 16", str(widths))
