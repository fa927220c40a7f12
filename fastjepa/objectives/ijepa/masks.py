"""Which patches are seen and which are predicted: the multi-block sampler of I-JEPA (paper, section 3), for whole batches.

A target block is a rectangle of patches; the context is a larger rectangle minus the target blocks. One block size for
the targets and one for the context are drawn per step and shared by all images; positions are drawn per image. All
draws are counter-based, so the masks are a pure function of (seed, step, sample index): the same on any device, at any
world size, in any split of the batch. (The cut of the `official` mode depends, by its definition, on the given batch.)

Block sizes come from `block_sizes`; everything per image is integer arithmetic on the device of the sample indices
(`fastjepa_kernels.mask_sampling`, which also says which random words are used for what).

Shapes: B images, N patches in raster order, M target blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from fastjepa.objectives.ijepa.block_sizes import MaskConfig, check_grid, rules_of_step
from fastjepa_kernels.mask_sampling import mask_sampling
from fastjepa_kernels.ragged import Ragged


@dataclass(frozen=True)
class MaskBatch:
    """The masks of B images, packed. Indices are int64, on one device, in raster order within a sequence.

    A patch index is flat: image * N + patch.
    """

    num_images: int
    """B."""
    num_patches: int
    """N = grid_h * grid_w."""
    context_indices: Tensor
    """[T_c] patch indices of the context tokens."""
    context_lengths: Ragged
    """B sequences of context tokens."""
    target_indices: Tensor
    """[T_t] patch indices of the target tokens."""
    target_lengths: Ragged
    """B * M sequences of target tokens: b * M + m is block m of image b."""
    union_indices: Tensor
    """[T_u] patch indices of each image's union of target blocks."""
    union_lengths: Ragged
    """B sequences of union patches."""
    union_rows: Tensor
    """[T_t] row of each target token in the packed union."""
    predictor_lengths: Ragged
    """B * M sequences: b * M + m is the context tokens of image b, then the target tokens of its block m."""
    predictor_rows: Tensor
    """[T_p] row of each predictor token in cat([context tokens, one row per patch position]): context token t is row t,
    a target token at position j of N is row T_c + j."""
    predictor_target_rows: Tensor
    """[T_t] rows of the target tokens in the packed predictor sequences."""

    def to(self, device: torch.device) -> MaskBatch:
        def moved(value: Any) -> Any:
            return value.to(device) if isinstance(value, Tensor | Ragged) else value

        return replace(self, **{f.name: moved(getattr(self, f.name)) for f in fields(self)})

    def tensors(self) -> list[Tensor]:
        """The tensors that the forward pass reads, except the union of target blocks: it varies in size, and CUDA graphs
        run without it."""
        return [
            self.context_indices,
            self.context_lengths.cu_seqlens,
            self.target_indices,
            self.target_lengths.cu_seqlens,
            self.predictor_lengths.cu_seqlens,
            self.predictor_rows,
            self.predictor_target_rows,
        ]

    def slices(self, num_images: int) -> Iterator[MaskBatch]:
        """The masks of the first `num_images` images, of the next, and so on. Reads lengths: for masks on the CPU."""
        blocks = self.target_lengths.num_seqs // self.num_images
        for first in range(0, self.num_images, num_images):
            stop = min(first + num_images, self.num_images)
            context, context_rows = self.context_lengths.slice(first, stop)
            target, target_rows = self.target_lengths.slice(first * blocks, stop * blocks)
            union, union_rows = self.union_lengths.slice(first, stop)
            predictor, predictor_rows = self.predictor_lengths.slice(first * blocks, stop * blocks)
            sources = self.predictor_rows[predictor_rows]
            # A context token's row counts from the slice's first, a position's from its number of context tokens.
            positions = sources >= self.context_lengths.total
            sources = sources - torch.where(positions, self.context_lengths.total - context.total, context_rows.start)
            yield MaskBatch(
                num_images=stop - first,
                num_patches=self.num_patches,
                context_indices=self.context_indices[context_rows] - first * self.num_patches,
                context_lengths=context,
                target_indices=self.target_indices[target_rows] - first * self.num_patches,
                target_lengths=target,
                union_indices=self.union_indices[union_rows] - first * self.num_patches,
                union_lengths=union,
                union_rows=self.union_rows[target_rows] - union_rows.start,
                predictor_lengths=predictor,
                predictor_rows=sources,
                predictor_target_rows=self.predictor_target_rows[target_rows] - predictor_rows.start,
            )


def sample_masks(
    config: MaskConfig, grid_h: int, grid_w: int, *, seed: int, step: int, sample_indices: Tensor
) -> MaskBatch:
    """The masks of one (micro) batch: a pure function of its arguments.

    The numbers of tokens are read back to the host, which waits for the current stream of the device: the loader does that
    in its thread, a batch ahead of the step.

    Args:
        config: the mask settings.
        grid_h, grid_w: rows and columns of patches.
        seed: of the run, in [0, 2^64).
        step: optimizer step, in [0, 2^32); all ranks and micro batches of a step share its block sizes.
        sample_indices: int64 [B], B > 0, the global index of each image; its device is that of the masks.

    Raises:
        ValueError: no valid mask exists (`check_grid`), or an argument is out of range (`mask_sampling`).
    """
    check_grid(config, grid_h, grid_w)
    rules = rules_of_step(config, grid_h, grid_w, seed=seed, step=step)
    masks = mask_sampling(rules, seed=seed, step=step, sample_indices=sample_indices)
    totals, longest = masks.sizes.tolist()

    def ragged(kind: int, cu_seqlens: Tensor) -> Ragged:
        return Ragged(cu_seqlens, longest[kind], totals[kind])

    context, target = ragged(0, masks.context_cu_seqlens), ragged(1, masks.target_cu_seqlens)
    union, predictor = ragged(2, masks.union_cu_seqlens), ragged(3, masks.predictor_cu_seqlens)
    return MaskBatch(
        num_images=len(sample_indices),
        num_patches=rules.num_patches,
        context_indices=masks.context_indices[: context.total],
        context_lengths=context,
        target_indices=masks.target_indices[: target.total],
        target_lengths=target,
        union_indices=masks.union_indices[: union.total],
        union_lengths=union,
        union_rows=masks.union_rows[: target.total],
        predictor_lengths=predictor,
        predictor_rows=masks.predictor_rows[: predictor.total],
        predictor_target_rows=masks.predictor_target_rows[: target.total],
    )
