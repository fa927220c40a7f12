"""The predictor: a narrow ViT that fills in target patches, told only their positions (paper, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastjepa.config import ModelConfig
from fastjepa.models.layers import (
    LAYER_NORM_EPS,
    OFFICIAL_STD,
    Block,
    Linear,
    TokenSubset,
    init_weights,
    run_block,
    sincos_position_table,
)
from fastjepa.objectives.ijepa.masks import MaskBatch
from fastjepa.objectives.ijepa.settings import PREDICTOR_MLP_RATIO, IJEPAConfig
from fastjepa_kernels import gather_add, masked_gather


class Predictor(nn.Module):
    """One sequence per target block: the image's context tokens, then a mask token for every patch of the block."""

    predictor_pos_embed: Tensor

    def __init__(self, settings: IJEPAConfig, model: ModelConfig, grid_h: int, grid_w: int) -> None:
        super().__init__()
        size, dim = model.size, settings.predictor_embed_dim
        self.savings = settings.savings
        self.recompute = model.activation_checkpointing
        self.predictor_embed = Linear(size.embed_dim, dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim))
        self.register_buffer("predictor_pos_embed", sincos_position_table(dim, grid_h, grid_w))
        self.predictor_blocks = nn.ModuleList(
            Block(dim, size.num_heads, PREDICTOR_MLP_RATIO) for _ in range(settings.depth_of_predictor(model.name))
        )
        self.predictor_norm = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.predictor_proj = Linear(dim, size.embed_dim)
        init_weights(self, self.predictor_blocks, model.init)
        nn.init.normal_(self.mask_token, std=OFFICIAL_STD)  # whatever `init` is for the layers

    def forward(self, context: Tensor, masks: MaskBatch) -> Tensor:
        """Features of the context tokens [T_context, D] -> predictions for the target tokens [T_target, D]."""
        positions = self.predictor_pos_embed[0]
        context = gather_add(self.predictor_embed(context), positions, masks.context_indices % masks.num_patches)
        # A mask token depends on its position alone: one row per position stands for those of all images and blocks.
        distinct = torch.cat([context, self.mask_token[0] + positions])
        source_rows: Tensor | None = masks.predictor_rows
        tokens = distinct
        if not self.savings.predictor_first_block:
            tokens, source_rows = masked_gather(distinct, masks.predictor_rows), None

        targets = TokenSubset(masks.predictor_target_rows, masks.target_lengths)
        last = len(self.predictor_blocks) - 1
        for index, block in enumerate(self.predictor_blocks):
            subset = targets if index == last and self.savings.predictor_last_block else None
            tokens = run_block(
                block, tokens, masks.predictor_lengths, recompute=self.recompute, source_rows=source_rows, subset=subset
            )
            source_rows = None
        if not self.savings.predictor_last_block:
            tokens = masked_gather(tokens, targets.rows, unique=True)
        return self.predictor_proj(self.predictor_norm(tokens))
