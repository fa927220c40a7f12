"""Building blocks of encoders and predictors: transformer block on packed tokens, position table, initialisation.

Parameter names are those of the official checkpoints and of timm (`norm1`, `attn.qkv`, `attn.proj`, `norm2`, `mlp.fc1`,
`mlp.fc2`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastjepa_kernels import Ragged, block_attention, block_attention_packed, linear, masked_gather

LAYER_NORM_EPS = 1e-6


@dataclass(frozen=True)
class TokenSubset:
    """The tokens of a packed batch whose outputs are needed. The others serve only as keys and values."""

    rows: Tensor
    """int64 [S]: rows of the packed batch, sequence by sequence."""
    lengths: Ragged
    """Number of these tokens in each sequence."""


class Linear(nn.Linear):
    """A linear layer of a block. `compute_with` can replace its computation."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self._product: Callable[[Tensor, Tensor, Tensor], Tensor] = linear
        self._weight_grad: Tensor | None = None

    def compute_with(
        self, *, product: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None, weight_grad: Tensor | None = None
    ) -> None:
        """Replace the computation of this layer, before the first step. Nothing else may change it.

        Args:
            product: a function of input, weight and bias, called in place of `fastjepa_kernels.linear`. None: as it is.
            weight_grad: the buffer of weight.grad, to which `fastjepa_kernels.linear` then adds. None: as it is.
        """
        self._product = product or self._product
        self._weight_grad = self._weight_grad if weight_grad is None else weight_grad

    def forward(self, x: Tensor) -> Tensor:
        if self._weight_grad is not None:
            return linear(x, self.weight, self.bias, self._weight_grad)
        return self._product(x, self.weight, self.bias)


class QKVProjection(Linear):
    """The fused query, key and value projection. The queries may come from a subset of the tokens."""

    def forward(self, x: Tensor, querying: Tensor | None = None) -> tuple[Tensor, ...]:  # type: ignore[override]
        """Project x [T, D] -> (qkv [T, 3 D],). If only tokens `querying` [S, D] have queries: (q [S, D], kv [T, 2 D])."""
        if querying is None:
            return (super().forward(x),)
        width = self.in_features
        q_bias, kv_bias = self.bias[:width], self.bias[width:]
        return self._product(querying, self.weight[:width], q_bias), self._product(x, self.weight[width:], kv_bias)


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = QKVProjection(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def forward(self, projected: tuple[Tensor, ...], queries: Ragged, keys: Ragged) -> Tensor:
        """Attend and project: the output of `qkv` -> [T, D], or [S, D] if S tokens have queries."""
        if len(projected) == 1:
            out = block_attention_packed(projected[0].unflatten(-1, (3, self.num_heads, -1)), keys)
        else:
            q, kv = projected
            k, v = kv.unflatten(-1, (2, self.num_heads, -1)).unbind(1)
            out = block_attention(q.unflatten(-1, (self.num_heads, -1)), k, v, queries, keys)
        return self.proj(out.flatten(1))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden_dim)
        self.fc2 = Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block on packed tokens."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(dim, round(dim * mlp_ratio))
        self._computation: Callable[..., Tensor] = Block.compute

    def compute_with(self, computation: Callable[..., Tensor]) -> None:
        """Replace the computation of this block, before the first step. Nothing else may change it.

        Args:
            computation: a function of the block and the arguments of `compute`; for example `compute`, compiled. The
                block's hooks run outside of it.
        """
        self._computation = computation

    def forward(
        self, x: Tensor, lengths: Ragged, *, source_rows: Tensor | None = None, subset: TokenSubset | None = None
    ) -> Tensor:
        """Run `compute`, or what `compute_with` put in its place."""
        return self._computation(self, x, lengths, source_rows=source_rows, subset=subset)

    def compute(
        self, x: Tensor, lengths: Ragged, *, source_rows: Tensor | None = None, subset: TokenSubset | None = None
    ) -> Tensor:
        """Attention and MLP, each with its LayerNorm before it and its residual sum after it.

        Args:
            x: [T, D] packed tokens; with `source_rows`, the [U, D] distinct rows that the tokens are copies of.
            lengths: the packed sequences (T tokens).
            source_rows: int64 [T]: token t is x[source_rows[t]]. LayerNorm and QKV then run once per distinct row.
            subset: the tokens whose outputs are needed; default: all.

        Returns:
            [T, D], or [S, D] for a subset of S tokens.
        """
        normed = self.norm1(x)
        if subset is None:
            projected, queries = self.attn.qkv(normed), lengths
            if source_rows is not None:
                projected, x = (masked_gather(projected[0], source_rows),), masked_gather(x, source_rows)
        else:
            rows = subset.rows if source_rows is None else source_rows[subset.rows]
            distinct = source_rows is None
            q, kv = self.attn.qkv(normed, masked_gather(normed, rows, unique=distinct))
            projected = q, kv if source_rows is None else masked_gather(kv, source_rows)
            x, queries = masked_gather(x, rows, unique=distinct), subset.lengths
        x = x + self.attn(projected, queries, lengths)
        return x + self.mlp(self.norm2(x))


def run_block(
    block: nn.Module,
    x: Tensor,
    lengths: Ragged,
    *,
    recompute: bool,
    source_rows: Tensor | None = None,
    subset: TokenSubset | None = None,
) -> Tensor:
    """Run `block(x, lengths, ...)`; with `recompute`, its activations are recomputed in the backward pass, not kept.

    The recomputed activations have the same bits, because nothing in a block is random. Without gradients, or in evaluation
    mode, there is nothing to keep, and `recompute` has no effect.
    """
    if recompute and block.training and torch.is_grad_enabled():
        return checkpoint(
            block, x, lengths, source_rows=source_rows, subset=subset, use_reentrant=False, preserve_rng_state=False
        )
    return block(x, lengths, source_rows=source_rows, subset=subset)


def sincos_position_table(dim: int, grid_h: int, grid_w: int) -> Tensor:
    """Fixed 2-D sine-cosine positions in MAE's convention.

    The first half of the features encodes the column, the second the row. Each half is [sin(pos * omega),
    cos(pos * omega)] with omega_k = 10000^(-k / (dim / 4)).

    Returns:
        [1, grid_h * grid_w, dim], fp32, computed in fp64.
    """
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    rows, columns = torch.meshgrid(torch.arange(grid_h).double(), torch.arange(grid_w).double(), indexing="ij")
    angles = [positions.reshape(-1, 1) * omega for positions in (columns, rows)]
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1)[None].float()


OFFICIAL_STD = 0.02


@torch.no_grad()
def init_weights(model: nn.Module, blocks: nn.ModuleList, init: str) -> None:
    """Initialise in place: normal weights of linear layers and convolutions, zero biases, LayerNorm 1 / 0.

    official: std 0.02, not cut. The official code names a truncated normal, but its cut is at an absolute +-2, which is 100
    standard deviations.
    depth_rescale: the same, and the residual outputs of block l (attn.proj, mlp.fc2), counted from 1, divided by sqrt(2 l).
    fan_in: normal of std 1 / sqrt(fan_in) cut at two standard deviations, which leaves a std of 0.88 / sqrt(fan_in), with
    the rescale by depth.

    Args:
        blocks: the model's transformer blocks in order.
        init: one of these (ModelConfig.init).
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            if init == "fan_in":
                std = module.weight[0].numel() ** -0.5
                nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
            else:
                nn.init.normal_(module.weight, std=OFFICIAL_STD)
            assert module.bias is not None
            nn.init.zeros_(module.bias)
    if init != "official":
        for index, block in enumerate(blocks, start=1):
            assert isinstance(block, Block)
            block.attn.proj.weight.div_(math.sqrt(2 * index))
            block.mlp.fc2.weight.div_(math.sqrt(2 * index))
