"""Helpers for the tests of kernels: the error that a kernel may have, and sequence lengths that break kernels."""

from __future__ import annotations

import torch
from torch import Tensor

# Sequence lengths by what they are meant to break. The block sizes of the kernels are powers of two from 16 to 128.
RAGGED_LENGTHS: dict[str, list[int]] = {
    "one token": [1],
    "one sequence": [37],
    "equal": [16, 16, 16],
    "around a block": [15, 16, 17, 63, 64, 65],
    "unsorted": [20, 65, 1, 33],
    "empty sequences": [0, 5, 0, 0, 12, 0],
    "only empty sequences": [0, 0],
    "no sequence": [],
}


def assert_close_to_reference(
    result: Tensor, same_dtype: Tensor, exact: Tensor, *, factor: float = 2.0, floor: float | None = None
) -> None:
    """Hold a kernel to a multiple of the error that plain PyTorch makes in the same dtype.

        max |result - exact| <= factor * max |same_dtype - exact| + floor

    Args:
        result: the kernel's result.
        same_dtype: the plain twin's result, computed in the kernel's dtype.
        exact: the plain twin's result in float64, from the same inputs.
        floor: absolute error that is always allowed. Default: half a unit in the last place of the largest exact value,
            since a kernel may round once even where its twin happens to be exact.

    Raises:
        AssertionError: the error is larger (the message has both), or there is a NaN, a wrong shape or a wrong dtype.
    """
    assert result.shape == exact.shape, f"shape {tuple(result.shape)}, expected {tuple(exact.shape)}"
    assert result.dtype == same_dtype.dtype, f"dtype {result.dtype}, expected {same_dtype.dtype}"
    if exact.numel() == 0:
        return
    if floor is None:
        floor = 0.5 * torch.finfo(result.dtype).eps * exact.abs().max().item()
    error = (result.double() - exact).abs().max().item()
    plain = (same_dtype.double() - exact).abs().max().item()
    assert error <= factor * plain + floor, (
        f"error {error:.3e} is above {factor} x {plain:.3e} (plain PyTorch in {result.dtype}) + {floor:.1e}"
    )
