"""Patches and tokens by packed index.

`patchify` reads images [B, C, H, W] as B * N rows of C * p * p values, in the order of a p x p convolution's weight, so
that the patch embedding is one matrix product. `masked_gather` takes the kept rows.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Images as rows of patches, image by image, in raster order.

    Args:
        images: [B, C, H, W].
        patch_size: p, dividing H and W.

    Returns:
        [B * (H / p) * (W / p), C * p * p], contiguous.

    Raises:
        ValueError: p does not divide H or W.
    """
    b, c, h, w = images.shape
    if h % patch_size or w % patch_size:
        raise ValueError(f"patchify: image size {h}x{w} is not a multiple of patch_size {patch_size}")
    grid = images.view(b, c, h // patch_size, patch_size, w // patch_size, patch_size)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(-1, c * patch_size * patch_size)


def masked_gather(rows: Tensor, indices: Tensor) -> Tensor:
    """rows[indices], with a deterministic gradient.

    Args:
        rows: [R, D].
        indices: int64 [T], in [0, R); repeated ones add up in the gradient.

    Returns:
        [T, D].
    """
    # embedding, not indexing: the same gather, but its gradient is a parallel, deterministic sum on CPU and GPU.
    return F.embedding(indices, rows)
