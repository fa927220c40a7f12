"""The I-JEPA objective: predict the target encoder's representations of the target blocks (paper, section 3, Eq. 1)."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from fastjepa.config import Config
from fastjepa.models import Predictor, VisionTransformer
from fastjepa.models.layers import TokenSubset
from fastjepa.objectives.ijepa.masks import MaskBatch
from fastjepa_kernels import Ragged, masked_gather, target_loss


class IJEPA(nn.Module):
    """Context encoder, predictor and target encoder; the forward pass is the loss.

    The target encoder starts as a copy of the context encoder and is moved by the optimizer (`fastjepa.optim`), never by
    gradients. Its parameters keep requires_grad=True, which makes it an ordinary parameter group for DeepSpeed; no
    gradient arises, because its forward pass runs under no_grad.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.autocast = False
        """Set by an engine: the forward pass computes in bf16, the weights stay in fp32. Here, because DeepSpeed on a GPU
        switches an autocast around its call of the model off."""
        self.context_encoder = VisionTransformer(config)
        self.predictor = Predictor(config)
        self.target_encoder = copy.deepcopy(self.context_encoder)

    def forward(self, images: Tensor, masks: MaskBatch) -> Tensor:
        """Images [B, C, H, W], uint8 or normalised floats, and the masks sampled for them -> loss, a scalar in fp32."""
        # The target after the context: its weights may still be on their way from the other ranks (`engine.zero_gather`).
        # Before the predictor: what its layers need for a moment then lies below the predictor's activations at the peak.
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.autocast):
            with record_function("context encoder"):
                context = self.context(images, masks)
            with record_function("target encoder"):
                features, rows = self.target_features(images, masks)
            with record_function("predictor"):
                predictions = self.predictor(context, masks)
            with record_function("loss"):
                return self.loss(predictions, features, rows)

    @torch.no_grad()
    def target_features(self, images: Tensor, masks: MaskBatch) -> tuple[Tensor, Tensor]:
        """Features of the images by the target encoder [R, D], and the row of each target token, int64 [T_target]."""
        encoder, num_patches = self.target_encoder, masks.num_patches
        positions = torch.arange(num_patches, device=images.device).repeat(masks.num_images)
        tokens = encoder.embed(encoder.patches(images), positions)
        lengths = Ragged.uniform(masks.num_images, num_patches, images.device)
        if self.config.objective.savings.target_last_block:
            return encoder.encode(tokens, lengths, TokenSubset(masks.union_indices, masks.union)), masks.union_rows
        return encoder.encode(tokens, lengths), masks.target_indices

    def context(self, images: Tensor, masks: MaskBatch) -> Tensor:
        """Features of the context patches [T_context, D]: the encoder sees nothing else."""
        encoder, indices = self.context_encoder, masks.context_indices
        if self.config.objective.savings.gather_before_embed:
            tokens = encoder.embed(encoder.patches(images, indices), indices % masks.num_patches)
        else:
            positions = torch.arange(masks.num_patches, device=images.device).repeat(masks.num_images)
            tokens = masked_gather(encoder.embed(encoder.patches(images), positions), indices, unique=True)
        return encoder.encode(tokens, masks.context)

    def loss(self, predictions: Tensor, features: Tensor, rows: Tensor) -> Tensor:
        """Mean over all elements of the predictions [T_target, D]."""
        objective = self.config.objective
        return target_loss(predictions, features, rows, loss=objective.loss, normalize=objective.normalize_targets)

    def trained_parameters(self) -> list[nn.Parameter]:
        """Parameters that get gradients: all but the target encoder's."""
        return [*self.context_encoder.parameters(), *self.predictor.parameters()]


def build_model(config: Config) -> IJEPA:
    """A freshly initialised model: the same weights for the same seed, whatever was drawn before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return IJEPA(config)
