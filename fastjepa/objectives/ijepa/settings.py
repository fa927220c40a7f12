"""Settings of I-JEPA. The defaults are those of the official code where it and the paper differ."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from fastjepa.config import Config, ObjectiveConfig
from fastjepa.config.settings import require, require_width
from fastjepa.objectives.ijepa.block_sizes import MaskConfig, check_grid

# Blocks of the predictor for each named model (appendix A.1, and the official model code).
_PREDICTOR_DEPTHS = {
    "vit_tiny": 6,
    "vit_small": 6,
    "vit_base": 6,
    "vit_large": 12,
    "vit_huge": 12,
    "vit_giant": 16,
}


PREDICTOR_MLP_RATIO = 4.0  # for every named model, as in the official code


@dataclass(frozen=True, kw_only=True)
class Savings:
    """Work that the step leaves out without changing outputs or gradients. Each can be turned off, to check that."""

    gather_before_embed: bool = True
    """Embed the context patches only, not all patches of the image."""
    target_last_block: bool = True
    """In the target encoder's last block, compute queries, projection and MLP for the patches of target blocks only."""
    predictor_last_block: bool = True
    """In the predictor's last block, compute queries, projection and MLP for the mask tokens only."""
    predictor_first_block: bool = True
    """In the predictor's first block, compute LayerNorm and QKV once per context token and mask position, not once per
    target block."""


@dataclass(frozen=True, kw_only=True)
class IJEPAConfig(ObjectiveConfig):
    """I-JEPA: what is predicted, by what, and how the error is measured (paper, section 3, Eq. 1)."""

    name: str = "ijepa"
    loss: Literal["smooth_l1", "l2"] = "smooth_l1"
    """smooth_l1 (beta 1) is what the official code trains with; l2, the mean squared error, is what the paper writes."""
    normalize_targets: bool = True
    """LayerNorm without affine over each target's features."""
    predictor_embed_dim: int = 384
    """Width of the predictor. It has as many heads as the encoder, as in the official code."""
    predictor_depth: int | None = None
    """Blocks of the predictor; null takes the value of the named model (model.name)."""
    masks: MaskConfig = field(default_factory=MaskConfig)
    savings: Savings = field(default_factory=Savings)

    @classmethod
    def of(cls, config: Config) -> IJEPAConfig:
        """The settings of a run whose objective is I-JEPA."""
        assert isinstance(config.objective, cls)
        return config.objective

    def depth_of_predictor(self, model_name: str) -> int:
        """Blocks of the predictor beside an encoder of this name."""
        return _PREDICTOR_DEPTHS[model_name] if self.predictor_depth is None else self.predictor_depth

    def check(self, config: Config) -> None:
        depth = self.depth_of_predictor(config.model.name)
        require(depth > 0, "objective.predictor_depth", depth, "a positive number")
        require_width("objective.predictor_embed_dim", self.predictor_embed_dim, config.model.size.num_heads)
        static = (
            self.masks.mode == "budget" and self.masks.strategy != "rasterized" and not self.savings.target_last_block
        )
        require(
            config.compile != "cuda_graphs" or static,
            "compile",
            config.compile,
            "objective.masks.mode = budget, another objective.masks.strategy than rasterized and "
            "objective.savings.target_last_block = false with it: all shapes are static then",
        )
        check_grid(self.masks, config.grid_h, config.grid_w)

    def resolved(self, config: Config) -> IJEPAConfig:
        return replace(self, predictor_depth=self.depth_of_predictor(config.model.name))
