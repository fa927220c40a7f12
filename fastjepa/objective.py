"""The I-JEPA objective: predict the target encoder's representations of the target blocks (paper, section 3, Eq. 1)."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastjepa.config import Config
from fastjepa.masks import MaskBatch
from fastjepa.models import Predictor, VisionTransformer
from fastjepa.models.layers import TokenSubset
from fastjepa_kernels import Ragged, masked_gather, patchify


class IJEPA(nn.Module):
    """Context encoder, predictor and target encoder; the forward pass is the loss.

    The target encoder starts as a copy of the context encoder and is moved by the optimizer (`fastjepa.optim`), never by
    gradients. Its parameters keep requires_grad=True, which makes it an ordinary parameter group for DeepSpeed; no
    gradient arises, because its forward pass runs under no_grad.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.context_encoder = VisionTransformer(config)
        self.predictor = Predictor(config)
        self.target_encoder = copy.deepcopy(self.context_encoder)

    def forward(self, images: Tensor, masks: MaskBatch) -> Tensor:
        """Images [B, C, H, W] and the masks sampled for them -> loss, a scalar in fp32."""
        patches = self.patches(images)
        targets = self.targets(patches, masks)
        predictions = self.predictor(self.context(patches, masks), masks)
        return self.loss(predictions, targets)

    def patches(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] as rows of patches [B * N, C * p * p], shared by both encoders."""
        return patchify(images, self.config.model.patch_size)

    @torch.no_grad()
    def targets(self, patches: Tensor, masks: MaskBatch) -> Tensor:
        """Representations of the target patches [T_target, D], fp32 (or the weights' dtype, if wider)."""
        encoder, num_patches = self.target_encoder, masks.num_patches
        positions = torch.arange(num_patches, device=patches.device).repeat(masks.num_images)
        tokens = encoder.embed(patches, positions)
        lengths = Ragged.uniform(masks.num_images, num_patches, patches.device)
        if self.config.objective.savings.target_last_block:
            features = encoder.encode(tokens, lengths, TokenSubset(masks.union_indices, masks.union))
            features, rows = _at_least_fp32(features), masks.union_rows
        else:
            features, rows = _at_least_fp32(encoder.encode(tokens, lengths)), masks.target_indices
        if self.config.objective.normalize_targets:
            features = F.layer_norm(features, features.shape[-1:], eps=1e-5)
        return features[rows]

    def context(self, patches: Tensor, masks: MaskBatch) -> Tensor:
        """Features of the context patches [T_context, D]: the encoder sees nothing else."""
        encoder, indices = self.context_encoder, masks.context_indices
        if self.config.objective.savings.gather_before_embed:
            tokens = encoder.embed(patches[indices], indices % masks.num_patches)
        else:
            positions = torch.arange(masks.num_patches, device=patches.device).repeat(masks.num_images)
            tokens = masked_gather(encoder.embed(patches, positions), indices)
        return encoder.encode(tokens, masks.context)

    def loss(self, predictions: Tensor, targets: Tensor) -> Tensor:
        """Mean over all elements of both [T_target, D]."""
        distance = F.smooth_l1_loss if self.config.objective.loss == "smooth_l1" else F.mse_loss
        return distance(_at_least_fp32(predictions), targets)

    def trained_parameters(self) -> list[nn.Parameter]:
        """Parameters that get gradients: all but the target encoder's."""
        return [*self.context_encoder.parameters(), *self.predictor.parameters()]


def _at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def build_model(config: Config) -> IJEPA:
    """A freshly initialised model: the same weights for the same seed, whatever was drawn before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return IJEPA(config)
