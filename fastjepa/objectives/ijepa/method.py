"""I-JEPA as the rest of fastjepa sees it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

import torch
from torch import Tensor

from fastjepa.config import Config
from fastjepa.objectives.base import Method, Moment
from fastjepa.objectives.ijepa import costs
from fastjepa.objectives.ijepa.costs import Tokens
from fastjepa.objectives.ijepa.masks import sample_masks
from fastjepa.objectives.ijepa.objective import IJEPAObjective, MaskedImages
from fastjepa.objectives.ijepa.settings import IJEPAConfig, Savings
from fastjepa_kernels import Operation


class IJEPA(Method):
    stages = ("context encoder", "target encoder", "predictor", "loss")
    savings = tuple(f"objective.savings.{field.name}" for field in fields(Savings))
    evaluated = "target_encoder"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.settings = IJEPAConfig.of(config)

    def build(self) -> IJEPAObjective:
        return IJEPAObjective(self.config)

    def prepare(self, views: Sequence[Tensor], sample_indices: Tensor, moment: Moment) -> MaskedImages:
        config = self.config
        masks = sample_masks(
            self.settings.masks,
            config.grid_h,
            config.grid_w,
            seed=config.seed,
            step=moment.step,
            sample_indices=sample_indices,
        )
        return MaskedImages(views[0], masks)

    def operations(self, dtype: torch.dtype) -> list[Operation]:
        heads = self.config.model.size.num_heads
        head_dims = {width // heads for width in (self.config.model.size.embed_dim, self.settings.predictor_embed_dim)}
        return [
            Operation("masked_gather", dtype),
            *(Operation("block_attention", dtype, head_dim) for head_dim in sorted(head_dims)),
            Operation("mask_sampling", torch.int64),
            Operation("target_loss", dtype),
            Operation("linear", dtype),
        ]

    def typical_tokens(self) -> tuple[Tokens, Tokens]:
        return costs.sample_tokens(self.settings.masks, self.config.grid_h, self.config.grid_w)

    def first_part_flops(self, tokens: Tokens) -> float:
        return costs.forward_flops(self.config, tokens).context

    def step_flops(self, tokens: Tokens, *, recomputed: bool = True) -> float:
        return costs.step_flops(self.config, tokens, recomputed=recomputed)

    def activation_bytes(self, tokens: Tokens, *, bf16: bool, autocast: bool) -> float:
        return costs.activation_bytes(self.config, tokens, bf16=bf16, autocast=autocast)
