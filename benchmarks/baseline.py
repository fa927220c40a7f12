"""I-JEPA as a good engineer would write it first: torch modules, eager attention, AdamW, a loop for the EMA.

`benchmarks.step` compares fastjepa with this baseline. It follows the paper (Assran et al. 2023, section 3) and the official
description: dense batches [B, tokens, D], one row of the predictor's batch per target block, the target encoder on all
patches. The parameter names are those of fastjepa, so that one set of weights serves both
(`tests/benchmarks/test_baseline.py`: same loss, same gradients, same weights and EMA after several steps).

Official masks are cut to the batch minimum, so all sequences have one length. With ragged masks the batch is padded to its
longest sequence and attention is masked (`Positions`).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastjepa.config import Config
from fastjepa.models.layers import sincos_position_table
from fastjepa.objectives.ijepa.masks import MaskBatch
from fastjepa.objectives.ijepa.settings import IJEPAConfig
from fastjepa_kernels import Ragged

NORM_EPS = 1e-6
PREDICTOR_MLP_RATIO = 4.0


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        b, n, d = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, d // self.num_heads).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-2, -1)) * self.scale
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        out = scores.softmax(dim=-1) @ v
        return self.proj(out.transpose(1, 2).reshape(b, n, d))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, dim: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = Mlp(dim, round(dim * mlp_ratio))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.attn(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    def __init__(self, in_channels: int, embed_dim: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, embed_dim, patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


@dataclass(frozen=True)
class Positions:
    """The patch positions of S sequences, padded at the end to the longest length L if the lengths differ."""

    indices: Tensor
    """int64 [S, L]; 0 at padding."""
    valid: Tensor | None
    """bool [S, L], True at tokens and False at padding. None if nothing is padded."""

    @staticmethod
    def of(flat: Tensor, lengths: Ragged, num_patches: int) -> Positions:
        """Split packed indices into the batch [T] into one padded row per sequence."""
        rows = (flat % num_patches).split(lengths.lengths().tolist())
        indices = nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
        valid = torch.arange(indices.shape[1], device=indices.device) < lengths.lengths()[:, None]
        return Positions(indices, None if bool(valid.all()) else valid)


def take(x: Tensor, indices: Tensor) -> Tensor:
    """Pick the tokens of x [B, N, D] at indices [B, L]: [B, L, D]."""
    return x.gather(1, indices[..., None].expand(-1, -1, x.shape[-1]))


def key_mask(valid: Tensor | None) -> Tensor | None:
    """Shape [S, L] as [S, 1, 1, L], to broadcast over attention scores [S, H, L, L]."""
    return None if valid is None else valid[:, None, None]


class VisionTransformer(nn.Module):
    pos_embed: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        size = config.model.size
        self.patch_embed = PatchEmbed(config.data.in_channels, size.embed_dim, config.model.patch_size)
        self.register_buffer("pos_embed", sincos_position_table(size.embed_dim, config.grid_h, config.grid_w))
        self.blocks = nn.ModuleList(Block(size.embed_dim, size.num_heads, size.mlp_ratio) for _ in range(size.depth))
        self.norm = nn.LayerNorm(size.embed_dim, eps=NORM_EPS)

    def forward(self, images: Tensor, kept: Positions | None = None) -> Tensor:
        x = self.patch_embed(images) + self.pos_embed
        mask = None
        if kept is not None:
            x = take(x, kept.indices)
            mask = key_mask(kept.valid)
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x)


class Predictor(nn.Module):
    predictor_pos_embed: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        size, settings = config.model.size, IJEPAConfig.of(config)
        dim, depth = settings.predictor_embed_dim, settings.depth_of_predictor(config.model.name)
        self.predictor_embed = nn.Linear(size.embed_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.register_buffer("predictor_pos_embed", sincos_position_table(dim, config.grid_h, config.grid_w))
        self.predictor_blocks = nn.ModuleList(Block(dim, size.num_heads, PREDICTOR_MLP_RATIO) for _ in range(depth))
        self.predictor_norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.predictor_proj = nn.Linear(dim, size.embed_dim)

    def forward(self, context: Tensor, kept: Positions, wanted: Positions) -> Tensor:
        """Predict [B M, L, D] at the positions `wanted` [B M, L] from context tokens [B, K, D] at the positions `kept`."""
        num_blocks = len(wanted.indices) // len(context)
        x = self.predictor_embed(context) + self.predictor_pos_embed[0][kept.indices]
        x = x.repeat_interleave(num_blocks, dim=0)
        x = torch.cat([x, self.mask_token + self.predictor_pos_embed[0][wanted.indices]], dim=1)
        mask = None
        if kept.valid is not None or wanted.valid is not None:
            seen = torch.ones_like(kept.indices, dtype=torch.bool) if kept.valid is None else kept.valid
            asked = torch.ones_like(wanted.indices, dtype=torch.bool) if wanted.valid is None else wanted.valid
            mask = key_mask(torch.cat([seen.repeat_interleave(num_blocks, dim=0), asked], dim=1))
        for block in self.predictor_blocks:
            x = block(x, mask)
        x = self.predictor_norm(x)
        return self.predictor_proj(x[:, kept.indices.shape[1] :])


class BaselineIJEPA(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.context_encoder = VisionTransformer(config)
        self.predictor = Predictor(config)
        self.target_encoder = copy.deepcopy(self.context_encoder)
        self.target_encoder.requires_grad_(False)

    def forward(self, images: Tensor, masks: MaskBatch) -> Tensor:
        """The smooth-L1 loss of normalised images [B, C, height, width]."""
        kept = Positions.of(masks.context_indices, masks.context_lengths, masks.num_patches)
        wanted = Positions.of(masks.target_indices, masks.target_lengths, masks.num_patches)
        with torch.no_grad():
            h = self.target_encoder(images)
            h = F.layer_norm(h, h.shape[-1:])
            h = take(h.repeat_interleave(len(wanted.indices) // len(h), dim=0), wanted.indices)
        z = self.predictor(self.context_encoder(images, kept), kept, wanted)
        if wanted.valid is not None:
            z, h = z[wanted.valid], h[wanted.valid]
        return F.smooth_l1_loss(z, h)


class Baseline:
    """The model with its optimizer. `step` does what fastjepa's `Engine.micro_step` does, in its plainest form."""

    def __init__(self, model: BaselineIJEPA, config: Config, *, bf16: bool = False) -> None:
        self.model, self.bf16 = model, bf16
        trained = [*model.context_encoder.parameters(), *model.predictor.parameters()]
        decay = [p for p in trained if p.ndim > 1]
        no_decay = [p for p in trained if p.ndim <= 1]
        groups: list[dict[str, Any]] = [{"params": decay}, {"params": no_decay, "weight_decay": 0.0}]
        optim = config.optim
        self.optimizer = torch.optim.AdamW(
            groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay
        )
        self.ema_momentum = optim.ema_momentum[0]

    def step(self, images: Tensor, masks: MaskBatch) -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            loss: Tensor = self.model(images, masks)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            pairs = zip(self.model.context_encoder.parameters(), self.model.target_encoder.parameters(), strict=True)
            for online, target in pairs:
                target.mul_(self.ema_momentum).add_(online, alpha=1 - self.ema_momentum)
        return loss.detach()
