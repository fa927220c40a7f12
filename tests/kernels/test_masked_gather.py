"""Patches and gathers against their plain twins."""

import pytest
import torch

from fastjepa_kernels import masked_gather, patchify
from fastjepa_kernels.reference import masked_gather_reference, patchify_reference


@pytest.mark.parametrize("shape", [(2, 3, 8, 12), (1, 1, 4, 4), (3, 5, 4, 20)])
def test_patches_are_in_raster_order(shape: tuple[int, ...]) -> None:
    images = torch.randn(shape)
    assert torch.equal(patchify(images, 4), patchify_reference(images, 4))


def test_patch_rows_times_the_flat_weight_is_the_convolution() -> None:
    images = torch.randn(2, 3, 8, 12, dtype=torch.float64)
    conv = torch.nn.Conv2d(3, 5, 4, stride=4, dtype=torch.float64)
    assert conv.bias is not None
    rows = patchify(images, 4) @ conv.weight.flatten(1).T + conv.bias
    torch.testing.assert_close(rows, conv(images).permute(0, 2, 3, 1).reshape(-1, 5), rtol=0, atol=1e-12)


def test_a_size_that_the_patch_does_not_divide_is_named() -> None:
    with pytest.raises(ValueError, match="8x10 is not a multiple of patch_size 4"):
        patchify(torch.zeros(1, 3, 8, 10), 4)


def test_gradient_adds_up_repeated_rows() -> None:
    rows = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    indices = torch.tensor([4, 0, 0, 2, 4, 4])
    upstream = torch.randn(6, 3, dtype=torch.float64)
    out, plain = masked_gather(rows, indices), masked_gather_reference(rows, indices)
    assert torch.equal(out, plain)
    torch.testing.assert_close(*(torch.autograd.grad(y, rows, upstream)[0] for y in (out, plain)), rtol=0, atol=1e-12)
