"""The networks of I-JEPA, and its loss: predict what the target encoder makes of the target blocks (section 3, Eq. 1)."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.profiler import record_function

from fastjepa.config import Config
from fastjepa.models.layers import TokenSubset
from fastjepa.models.vision_transformer import VisionTransformer
from fastjepa.objectives.base import Objective, Output, Part, Prepared
from fastjepa.objectives.ijepa.costs import MaskLengths
from fastjepa.objectives.ijepa.masks import MaskBatch
from fastjepa.objectives.ijepa.predictor import Predictor
from fastjepa.objectives.ijepa.settings import IJEPAConfig
from fastjepa_kernels import Ragged, masked_gather, target_loss


@dataclass(frozen=True)
class MaskedImages(Prepared):
    """A micro batch: images and the masks sampled for them."""

    images: Tensor
    """[B, C, H, W], uint8 or normalised floats."""
    masks: MaskBatch

    @property
    def num_images(self) -> int:
        return self.masks.num_images

    @property
    def counts(self) -> Mapping[str, int]:
        return {
            "context_tokens": self.masks.context_lengths.total,
            "target_tokens": self.masks.target_lengths.total,
        }

    def tensors(self) -> list[Tensor]:
        return [self.images, *self.masks.tensors()]

    def slices(self, num_images: int) -> Iterator[tuple[MaskedImages, float]]:
        """The loss is a mean over target tokens: a slice counts by its share of them."""
        for images, masks in zip(self.images.split(num_images), self.masks.slices(num_images), strict=True):
            yield MaskedImages(images, masks), masks.target_lengths.total / self.masks.target_lengths.total

    def lengths(self) -> MaskLengths:
        return MaskLengths.of(self.masks)

    def to(self, device: torch.device) -> MaskedImages:
        return MaskedImages(self.images.to(device), self.masks.to(device))


class IJEPAObjective(Objective):
    """Context encoder, predictor and target encoder.

    The target encoder starts as a copy of the context encoder and is moved by the optimizer (`fastjepa.optim`), never by
    gradients. Its parameters keep requires_grad=True, which makes it an ordinary parameter group for DeepSpeed; no
    gradient arises, because its forward pass runs under no_grad.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self.settings = config, IJEPAConfig.of(config)
        self.context_encoder = VisionTransformer(config.model, config.data)
        self.predictor = Predictor(self.settings, config.model, config.grid_h, config.grid_w)
        self.target_encoder = copy.deepcopy(self.context_encoder)

    @property
    def parts(self) -> tuple[Part, ...]:
        return (
            Part("context_encoder", self.context_encoder),
            Part("predictor", self.predictor),
            Part("target_encoder", self.target_encoder, averages="context_encoder"),
        )

    def compute(self, batch: MaskedImages) -> Output:
        images, masks = batch.images, batch.masks
        # The target encoder computes after the context encoder, because its weights may still be on their way from the
        # other ranks (`engine.zero_gather`), and before the predictor, so that the memory that its layers need for a
        # moment lies below the predictor's activations at the peak.
        with record_function("context encoder"):
            context = self.context(images, masks)
        with record_function("target encoder"):
            features, rows = self.target_features(images, masks)
        with record_function("predictor"):
            predictions = self.predictor(context, masks)
        with record_function("loss"):
            return Output(self.loss(predictions, features, rows), {})

    @torch.no_grad()
    def target_features(self, images: Tensor, masks: MaskBatch) -> tuple[Tensor, Tensor]:
        """Features of the images by the target encoder [R, D], and the row of each target token, int64 [T_target]."""
        encoder, num_patches = self.target_encoder, masks.num_patches
        positions = torch.arange(num_patches, device=images.device).repeat(masks.num_images)
        tokens = encoder.embed(encoder.patches(images), positions)
        lengths = Ragged.uniform(masks.num_images, num_patches, images.device)
        if self.settings.savings.target_last_block:
            return encoder.encode(
                tokens, lengths, TokenSubset(masks.union_indices, masks.union_lengths)
            ), masks.union_rows
        return encoder.encode(tokens, lengths), masks.target_indices

    def context(self, images: Tensor, masks: MaskBatch) -> Tensor:
        """Features of the context patches [T_context, D]: the encoder sees nothing else."""
        encoder, indices = self.context_encoder, masks.context_indices
        if self.settings.savings.gather_before_embed:
            tokens = encoder.embed(encoder.patches(images, indices), indices % masks.num_patches)
        else:
            positions = torch.arange(masks.num_patches, device=images.device).repeat(masks.num_images)
            tokens = masked_gather(encoder.embed(encoder.patches(images), positions), indices, unique=True)
        return encoder.encode(tokens, masks.context_lengths)

    def loss(self, predictions: Tensor, features: Tensor, rows: Tensor) -> Tensor:
        """Mean error over all elements of the predictions [T_target, D]; a scalar in fp32."""
        settings = self.settings
        return target_loss(predictions, features, rows, loss=settings.loss, normalize=settings.normalize_targets)
