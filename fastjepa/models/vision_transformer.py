"""The encoder: a ViT without class token (Dosovitskiy et al. 2021), on packed tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastjepa.config import DataConfig, ModelConfig
from fastjepa.models.layers import LAYER_NORM_EPS, Block, TokenSubset, init_weights, run_block, sincos_position_table
from fastjepa_kernels import Ragged, gather_add, gather_patches, linear


class PatchProjection(nn.Conv2d):
    """A convolution whose stride is the patch size: one matrix product, as its input is already cut into rows of patches."""

    def forward(self, patches: Tensor) -> Tensor:
        """Project rows of patches [T, C * p * p] -> [T, D]."""
        assert self.bias is not None
        return linear(patches, self.weight.flatten(1), self.bias)


class PatchEmbed(nn.Module):
    def __init__(self, in_channels: int, embed_dim: int, patch_size: int) -> None:
        super().__init__()
        self.proj = PatchProjection(in_channels, embed_dim, patch_size, stride=patch_size)

    def forward(self, patches: Tensor) -> Tensor:
        return self.proj(patches)


class VisionTransformer(nn.Module):
    """Patch embedding, fixed positions, pre-norm blocks, final LayerNorm.

    `forward` takes whole images. Training calls `patches`, `embed` and `encode`, on packed patches.
    """

    pos_embed: Tensor

    def __init__(self, model: ModelConfig, data: DataConfig) -> None:
        super().__init__()
        size = model.size
        self.in_channels, self.patch_size = data.in_channels, model.patch_size
        self.mean, self.std = data.mean, data.std
        self.grid_h, self.grid_w = (pixels // model.patch_size for pixels in data.image_hw)
        self.recompute = model.activation_checkpointing
        self.patch_embed = PatchEmbed(self.in_channels, size.embed_dim, self.patch_size)
        self.register_buffer("pos_embed", sincos_position_table(size.embed_dim, self.grid_h, self.grid_w))
        self.blocks = nn.ModuleList(Block(size.embed_dim, size.num_heads, size.mlp_ratio) for _ in range(size.depth))
        self.norm = nn.LayerNorm(size.embed_dim, eps=LAYER_NORM_EPS)
        init_weights(self, self.blocks, model.init)

    def patches(self, images: Tensor, indices: Tensor | None = None) -> Tensor:
        """Cut images into rows of patches, in the dtype in which `embed` computes.

        Args:
            images: [B, C, H, W], uint8 or normalised floats. uint8 is normalised here.
            indices: int64 [T], the patches to take, out of B * N; default: all.

        Returns:
            [T, C * p * p], or [B * N, C * p * p] for all patches.
        """
        device_type = images.device.type
        dtype = (
            torch.get_autocast_dtype(device_type)
            if torch.is_autocast_enabled(device_type)
            else self.patch_embed.proj.weight.dtype
        )
        if images.dtype == torch.uint8:
            return gather_patches(images, indices, self.patch_size, mean=self.mean, std=self.std, dtype=dtype)
        return gather_patches(images, indices, self.patch_size, dtype=dtype)

    def embed(self, patches: Tensor, positions: Tensor) -> Tensor:
        """Embed rows of patches [T, C * p * p], at positions int64 [T] in [0, N) -> tokens [T, D]."""
        return gather_add(self.patch_embed(patches), self.pos_embed[0], positions)

    def encode(self, tokens: Tensor, lengths: Ragged, subset: TokenSubset | None = None) -> Tensor:
        """Run the blocks on tokens [T, D] in packed sequences -> features [T, D], or [S, D] for a subset of the tokens."""
        *first, last = self.blocks
        for block in first:
            tokens = run_block(block, tokens, lengths, recompute=self.recompute)
        return self.norm(run_block(last, tokens, lengths, recompute=self.recompute, subset=subset))

    def forward(self, images: Tensor) -> Tensor:
        """Encode images [B, C, H, W], uint8 or normalised floats -> features of all patches [B, N, D].

        Raises:
            ValueError: the images' channels or size are not those of the model.
        """
        expected = (self.in_channels, self.grid_h * self.patch_size, self.grid_w * self.patch_size)
        if images.ndim != 4 or tuple(images.shape[1:]) != expected:
            raise ValueError(
                f"images have shape {tuple(images.shape)}, expected [B, C, H, W] with (C, H, W) = {expected}"
            )
        num_images, num_patches = images.shape[0], self.grid_h * self.grid_w
        positions = torch.arange(num_patches, device=images.device).repeat(num_images)
        tokens = self.embed(self.patches(images), positions)
        lengths = Ragged.uniform(num_images, num_patches, images.device)
        return self.encode(tokens, lengths).unflatten(0, (num_images, num_patches))
