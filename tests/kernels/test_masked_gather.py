"""Patches and gathers on PyTorch against their plain twins."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastjepa_kernels.masked_gather import gather_add, gather_patches, masked_gather, patchify
from fastjepa_kernels.reference import (
    gather_add_reference,
    gather_patches_reference,
    masked_gather_reference,
    patchify_reference,
)
from tests.support.accuracy import assert_close_to_reference

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


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


def layouts(images: Tensor) -> dict[str, Tensor]:
    """The same pixels in the layouts that a decoder, a loader or a crop of a larger image may leave."""
    b, c, h, w = images.shape
    larger = torch.zeros(b, c, h + 3, w + 5, dtype=images.dtype)
    larger[:, :, 1 : h + 1, 2 : w + 2] = images
    return {
        "contiguous": images,
        "channels last": images.contiguous(memory_format=torch.channels_last),
        "a crop": larger[:, :, 1 : h + 1, 2 : w + 2],
        "one image expanded": images[:1].expand(b, -1, -1, -1),
    }


@pytest.mark.parametrize("layout", list(layouts(torch.zeros(1, 1, 1, 1))))
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kept", [[5, 0, 11, 2, 2], [], None])
def test_kept_patches_are_read_and_normalised(layout: str, dtype: torch.dtype, kept: list[int] | None) -> None:
    images = layouts((torch.rand(2, 3, 8, 12) * 255).to(dtype))[layout]
    indices = None if kept is None else torch.tensor(kept, dtype=torch.int64)
    rows = torch.arange(12) if indices is None else indices
    result = gather_patches(images, indices, 4, mean=MEAN, std=STD)
    plain, exact = (
        gather_patches_reference(images, rows, 4, MEAN, STD, wide) for wide in (torch.float32, torch.float64)
    )
    assert result.is_contiguous()
    assert_close_to_reference(result, plain.to(torch.float32 if dtype == torch.uint8 else dtype), exact)


def test_floating_pixels_are_copied_without_mean_and_std() -> None:
    images = torch.randn(2, 3, 8, 12, dtype=torch.float16)
    indices = torch.tensor([3, 7])
    assert torch.equal(gather_patches(images, indices, 4), patchify_reference(images, 4)[indices])


def test_bytes_become_numbers_from_0_to_1_in_the_requested_dtype() -> None:
    images = torch.tensor([0, 51, 255, 102], dtype=torch.uint8).view(1, 1, 2, 2)
    result = gather_patches(images, None, 2, dtype=torch.bfloat16)
    assert torch.equal(result, torch.tensor([[0, 0.2, 1, 0.4]], dtype=torch.bfloat16))


def test_mean_and_std_are_sent_to_the_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sending them makes the host wait for a GPU, which the capture of a CUDA graph forbids."""
    images = torch.randint(256, (2, 3, 8, 12), dtype=torch.uint8)
    rows = gather_patches(images, None, 4, mean=MEAN, std=STD)
    monkeypatch.setattr(torch, "tensor", None)
    assert torch.equal(gather_patches(images, None, 4, mean=MEAN, std=STD), rows)


def test_normalisation_does_not_change_the_images() -> None:
    images = torch.rand(1, 3, 4, 4)
    before = images.clone()
    gather_patches(images, None, 4, mean=MEAN, std=STD)  # the one patch is a view of the image
    assert torch.equal(images, before)


def test_kept_patches_are_gathered_without_patchifying_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(images: Tensor, patch_size: int) -> Tensor:
        raise AssertionError("all patches were read")

    monkeypatch.setattr(import_module("fastjepa_kernels.masked_gather"), "patchify", refuse)
    for images in layouts(torch.rand(2, 3, 8, 12)).values():
        gather_patches(images, torch.tensor([1]), 4)
    with pytest.raises(AssertionError, match="all patches"):
        gather_patches(images, None, 4)


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_any_gather_and_its_gradient_equal_those_of_indexing(data: st.DataObject) -> None:
    num_rows, width, gap = (data.draw(st.integers(low, 9)) for low in (1, 1, 0))
    indices = torch.tensor(data.draw(st.lists(st.integers(0, num_rows - 1), max_size=30)), dtype=torch.int64)
    rows = torch.randn(num_rows, width + gap, dtype=torch.float64)[:, :width].requires_grad_()
    upstream = torch.randn(len(indices), width, dtype=torch.float64)
    unique = len(indices.unique()) == len(indices)
    out, plain = masked_gather(rows, indices, unique=unique), masked_gather_reference(rows, indices)
    assert torch.equal(out, plain)
    gradients = (torch.autograd.grad(y, rows, upstream)[0] for y in (out, plain))
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_any_position_is_added_and_the_gradient_passes_through(data: st.DataObject) -> None:
    num_rows, width, gap = (data.draw(st.integers(low, 9)) for low in (1, 1, 0))
    positions = torch.tensor(data.draw(st.lists(st.integers(0, num_rows - 1), max_size=30)), dtype=torch.int64)
    table = torch.randn(num_rows, width + gap)[:, :width]
    tokens = torch.randn(len(positions), width + gap)[:, :width].requires_grad_()
    before = table.clone()
    out = gather_add(tokens, table, positions)
    assert torch.equal(out, gather_add_reference(tokens, table, positions))
    assert torch.equal(table, before)
    upstream = torch.randn(len(positions), width)
    assert torch.equal(torch.autograd.grad(out, tokens, upstream)[0], upstream)


def test_half_tokens_and_a_wide_table_make_a_wide_sum() -> None:
    tokens, table, positions = torch.randn(3, 4).bfloat16().requires_grad_(), torch.randn(2, 4), torch.tensor([1, 0, 1])
    out = gather_add(tokens, table, positions)
    assert out.dtype == torch.float32
    assert torch.equal(out, tokens.float() + table[positions])
    assert torch.autograd.grad(out.sum(), tokens)[0].dtype == torch.bfloat16


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_any_patch_of_any_image_and_layout_is_gathered(data: st.DataObject) -> None:
    b, c, grid_h, grid_w, p = (data.draw(st.integers(1, 4)) for _ in range(5))
    images = torch.randn(b, c, grid_h * p, grid_w * p)
    layout = layouts(images)[data.draw(st.sampled_from(list(layouts(images))))]
    kept = data.draw(st.lists(st.integers(0, b * grid_h * grid_w - 1), max_size=10))
    indices = torch.tensor(kept, dtype=torch.int64)
    assert torch.equal(gather_patches(layout, indices, p), patchify_reference(layout, p)[indices])


ROWS, INDICES, IMAGES = torch.zeros(5, 4), torch.zeros(3, dtype=torch.int64), torch.zeros(1, 3, 8, 8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: patchify(torch.zeros(1, 3, 8, 10), 4), "8x10 is not a multiple of patch_size 4"),
        (lambda: gather_patches(torch.zeros(1, 3, 8, 10), INDICES, 4), "8x10 is not a multiple of patch_size 4"),
        (lambda: gather_patches(IMAGES[0], INDICES, 4), r"float32 \(3, 8, 8\), expected uint8 or floating \[B"),
        (lambda: gather_patches(IMAGES.int(), INDICES, 4), "int32 .* expected uint8 or floating"),
        (lambda: gather_patches(IMAGES, INDICES, 4, mean=(0.5,)), "mean has 1 values, expected one for each of 3"),
        (lambda: gather_patches(IMAGES, INDICES, 4, std=(1.0,) * 4), "std has 4 values, expected one for each of 3"),
        (lambda: gather_patches(IMAGES, INDICES.int(), 4), "indices are torch.int32"),
        (lambda: gather_patches(IMAGES.clone().requires_grad_(), INDICES, 4), "images require a gradient"),
        (lambda: masked_gather(ROWS[0], INDICES), r"rows has shape \(4,\)"),
        (lambda: masked_gather(ROWS.T, INDICES), r"strides \(1, 4\), expected .* the last one contiguous"),
        (lambda: masked_gather(ROWS, INDICES[None]), r"int64 \(1, 3\) on cpu, expected int64 \[T\]"),
        (lambda: masked_gather(ROWS, INDICES.to("meta")), r"on meta, expected int64 \[T\] on cpu"),
        (lambda: masked_gather(ROWS, torch.arange(6)[::2]), r"indices have strides \(2,\), expected contiguous"),
        (lambda: gather_add(ROWS[:3].long(), ROWS, INDICES), "got torch.int64 and torch.float32, expected floating"),
        (lambda: gather_patches(IMAGES, INDICES, 0), "is not a multiple of patch_size 0"),
        (lambda: gather_patches(IMAGES, INDICES, 4, std=(1.0, 0.0, 1.0)), "expected positive numbers"),
        (lambda: patchify(ROWS, 2), r"images have shape \(5, 4\), expected \[B, C, H, W\]"),
        (lambda: gather_add(ROWS, ROWS, INDICES), "got 3 positions, expected one for each of 5 tokens"),
        (lambda: gather_add(ROWS[:3, :2], ROWS, INDICES), r"table is \(5, 4\) on cpu, expected \[N, 2\] on cpu"),
        (lambda: gather_add(ROWS[:3], ROWS.clone().requires_grad_(), INDICES), "table requires a gradient"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_by_name(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_without_gradients_the_table_may_be_a_trained_one() -> None:
    with torch.no_grad():
        out = gather_add(ROWS[:3], torch.ones(2, 4, requires_grad=True), INDICES)
    assert torch.equal(out, torch.ones(3, 4))
    assert not out.requires_grad
