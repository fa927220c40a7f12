"""Patches and tokens by packed index: a patch that is left out of a batch is not read either.

`gather_patches` reads the pixels of the kept patches, normalises them and writes packed rows of C * p * p values, in the
order of a p x p convolution's weight. The patch embedding is then one matrix product, and so is its weight gradient.
`gather_add` adds the position table to the result of that product. `masked_gather` takes rows of tokens.

**Why the position table is not added inside the matrix product.** An index_select and an addition make five passes over
[T, D] (read the table, write the copy; read both, write the sum). `gather_add` makes two of them, and the table's N rows
stay in the L2 cache. An epilogue of the product would save those two as well: 77 MB for 128 images of 196 patches at D =
768 in bf16, which take 23 us at an H100's memory bandwidth, beside a product of 30 GFLOP, which takes 30 to 45 us. But
PyTorch gives cuBLAS no epilogue that gathers rows (addmm takes a matrix [T, D], which must first be written and read:
more passes, not fewer). So the product would have to be our own, and would have to come within a third of cuBLAS's rate
to break even, for less than one percent of the step. Adding in place would gain nothing: the passes are the same, and the
linear layer keeps no reference to its output, which is freed at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from fastjepa_kernels.selection import choose


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cut images into rows of patches, image by image, in raster order.

    Args:
        images: [B, C, H, W].
        patch_size: p, dividing H and W.

    Returns:
        [B * (H / p) * (W / p), C * p * p], contiguous.

    Raises:
        ValueError: p does not divide H or W.
    """
    if images.ndim != 4:
        raise ValueError(f"patchify: images have shape {tuple(images.shape)}, expected [B, C, H, W]")
    b, c, h, w = images.shape
    if patch_size < 1 or h % patch_size or w % patch_size:
        raise ValueError(f"patchify: image size {h}x{w} is not a multiple of patch_size {patch_size}")
    grid = images.view(b, c, h // patch_size, patch_size, w // patch_size, patch_size)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(-1, c * patch_size * patch_size)


def gather_patches(
    images: Tensor,
    indices: Tensor | None,
    patch_size: int,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Gather the kept patches as rows, normalised in fp32: (x - mean) / std by channel, with x / 255 in place of a uint8 x.

    The result is not differentiable, because images are data.

    Args:
        images: [B, C, H, W], uint8 or floating, any strides.
        indices: int64 [T], image * N + patch, with N = (H / p) * (W / p) and patches in raster order. Default: all patches.
        patch_size: p, dividing H and W.
        mean, std: a number for each channel, on the scale of floating images, where uint8's 255 is 1. Default: 0 and 1.
        dtype: dtype of the result; default: the images' dtype, or float32 for uint8.

    Returns:
        [T, C * p * p], contiguous, in the order (channel, y, x).

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or the images require a gradient.
    """
    if images.ndim != 4 or not (images.dtype == torch.uint8 or images.is_floating_point()):
        raise ValueError(
            f"gather_patches: images are {images.dtype} {tuple(images.shape)}, expected uint8 or floating [B, C, H, W]"
        )
    channels, height, width = images.shape[1:]
    if patch_size < 1 or height % patch_size or width % patch_size:
        raise ValueError(f"gather_patches: image size {height}x{width} is not a multiple of patch_size {patch_size}")
    if images.requires_grad and torch.is_grad_enabled():
        raise ValueError("gather_patches: images require a gradient, expected data")
    if indices is not None:
        check_indices("gather_patches", "indices", indices, images.device)
    for name, values in (("mean", mean), ("std", std)):
        if values is not None and len(values) != channels:
            raise ValueError(
                f"gather_patches: {name} has {len(values)} values, expected one for each of {channels} channels"
            )
    if std is not None and not all(s > 0 for s in std):
        raise ValueError(f"gather_patches: std is {list(std)}, expected positive numbers")
    if dtype is None:
        dtype = torch.float32 if images.dtype == torch.uint8 else images.dtype

    unit = 255.0 if images.dtype == torch.uint8 else 1.0
    scale = [1 / (unit * s) for s in std or [1.0] * channels]
    shift = [-m * unit * s for m, s in zip(mean or [0.0] * channels, scale, strict=True)]
    if choose("masked_gather", images.device.type, dtype) == "triton":
        from fastjepa_kernels.triton_kernels import masked_gather as triton_ops

        return triton_ops.gather_patches(images, indices, patch_size, scale, shift, dtype)
    pixels = _gather_pixels(images, indices, patch_size)
    if images.dtype != torch.uint8 and mean is None and std is None:
        return pixels.to(dtype)
    wide = torch.promote_types(images.dtype, torch.float32)
    factors, offsets = (_by_channel(tuple(x), wide, images.device) for x in (scale, shift))
    by_channel = pixels.unflatten(1, (channels, -1)).to(wide)
    return torch.addcmul(offsets, by_channel, factors).flatten(1).to(dtype)


@lru_cache(maxsize=32)
def _by_channel(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """[C, 1], cached: sending it to a GPU makes the host wait, which the capture of a CUDA graph forbids."""
    return torch.tensor(values, dtype=dtype, device=device)[:, None]


def _gather_pixels(images: Tensor, indices: Tensor | None, p: int) -> Tensor:
    """The rows of the kept patches, [T, C * p * p], not normalised."""
    if indices is None:
        return patchify(images, p)
    b, c, h, w = images.shape
    grid_h, grid_w = h // p, w // p
    image, patch = indices // (grid_h * grid_w), indices % (grid_h * grid_w)
    if not images.is_contiguous():
        grid = images.view(b, c, grid_h, p, grid_w, p).permute(0, 2, 4, 1, 3, 5)
        return grid[image, patch // grid_w, patch % grid_w].flatten(1)
    # Copy runs of p pixels, which is three to four times as fast as indexing the grid.
    first = (image * c * h + patch // grid_w * p) * grid_w + patch % grid_w  # [T]: the first run of each patch
    lines = torch.arange(c, device=images.device)[:, None] * h + torch.arange(p, device=images.device)  # [C, p]
    runs = (first[:, None] + lines.flatten() * grid_w).flatten()
    return images.view(b * c * h * grid_w, p).index_select(0, runs).view(len(indices), c * p * p)


def masked_gather(rows: Tensor, indices: Tensor, *, unique: bool = False) -> Tensor:
    """rows[indices], with a deterministic gradient.

    Args:
        rows: [R, D], the last dimension contiguous.
        indices: int64 [T] in [0, R), in any order. The gradients of a repeated index add up, in fp32.
        unique: the caller's promise that no index is repeated. Triton's gradient is then a mere scatter of rows (PyTorch's
            stays as it is). A broken promise gives a wrong gradient, unnoticed.

    Returns:
        [T, D].

    Raises:
        ValueError: shapes, strides, dtypes or devices do not fit.
    """
    check_rows("masked_gather", "rows", rows)
    check_indices("masked_gather", "indices", indices, rows.device)
    if choose("masked_gather", rows.device.type, rows.dtype) == "triton":
        from fastjepa_kernels.triton_kernels import masked_gather as triton_ops

        return triton_ops.gather_rows(rows, indices, unique)
    # embedding gathers as indexing does, but its gradient is a parallel, deterministic sum on CPU and GPU.
    return F.embedding(indices, rows)


def gather_add(tokens: Tensor, table: Tensor, positions: Tensor) -> Tensor:
    """tokens + table[positions], in one pass. The tokens' gradient is the upstream gradient itself.

    Args:
        tokens: [T, D], the last dimension contiguous.
        table: [N, D], the last dimension contiguous. It is a constant.
        positions: int64 [T] in [0, N).

    Returns:
        [T, D] in the wider of the two dtypes: under autocast, bf16 tokens enter an fp32 residual stream here.

    Raises:
        ValueError: shapes, strides, dtypes or devices do not fit, or the table requires a gradient.
    """
    check_rows("gather_add", "tokens", tokens)
    check_rows("gather_add", "table", table)
    check_indices("gather_add", "positions", positions, tokens.device)
    if (table.device, table.shape[1]) != (tokens.device, tokens.shape[1]):
        raise ValueError(
            f"gather_add: table is {tuple(table.shape)} on {table.device}, "
            f"expected [N, {tokens.shape[1]}] on {tokens.device}, as the tokens"
        )
    if len(positions) != len(tokens):
        raise ValueError(f"gather_add: got {len(positions)} positions, expected one for each of {len(tokens)} tokens")
    if not (tokens.is_floating_point() and table.is_floating_point()):
        raise ValueError(f"gather_add: got {tokens.dtype} and {table.dtype}, expected floating tokens and table")
    if table.requires_grad and torch.is_grad_enabled():
        raise ValueError("gather_add: table requires a gradient, expected a constant")
    if choose("masked_gather", tokens.device.type, tokens.dtype) == "triton":
        from fastjepa_kernels.triton_kernels import masked_gather as triton_ops

        return triton_ops.gather_add(tokens, table, positions)
    added = table.detach().index_select(0, positions)
    return added.to(torch.promote_types(tokens.dtype, table.dtype)).add_(tokens)


def check_rows(function: str, name: str, x: Tensor) -> None:
    """Raise ValueError unless x is a matrix whose rows are each contiguous."""
    if x.ndim != 2 or (x.stride(1) != 1 and x.shape[1] > 1):
        raise ValueError(
            f"{function}: {name} has shape {tuple(x.shape)} and strides {x.stride()}, expected two dimensions, the last "
            "one contiguous"
        )


def check_indices(function: str, name: str, indices: Tensor, device: torch.device) -> None:
    """Raise ValueError unless dtype, shape and device are those of row numbers on `device`. The values are not read."""
    if indices.ndim != 1 or indices.dtype != torch.int64 or indices.device != device:
        raise ValueError(
            f"{function}: {name} are {indices.dtype} {tuple(indices.shape)} on {indices.device}, "
            f"expected int64 [T] on {device}"
        )
    if not indices.is_contiguous():
        raise ValueError(f"{function}: {name} have strides {indices.stride()}, expected contiguous ones")
