"""The target loss in Triton: values, gradients, no element left unwritten, and the bytes that it moves."""

from __future__ import annotations

import math
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from fastjepa_kernels.reference import target_loss_reference
from fastjepa_kernels.target_loss import target_loss
from tests.kernels.triton.conftest import Engine, IdleKernel, compiled_only, interpreted_only, simulator_runs
from tests.support.accuracy import assert_close_to_reference

KINDS: list[dict[str, Any]] = [
    {},
    {"beta": 0.25},
    {"normalize": False},
    {"loss": "l2"},
    {"loss": "l2", "normalize": False},
    {"eps": 0.5},
]

pytestmark = pytest.mark.usefixtures("unwritten_memory_shows")


@pytest.fixture(autouse=True)
def same_numbers_in_every_run() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("kernel", ["_forward_kernel", "_backward_kernel"])
def test_rows_that_a_kernel_left_out_would_show(engine: Engine, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module("fastjepa_kernels.triton_kernels.target_loss"), kernel, IdleKernel())
    predictions = torch.zeros(2, 8, device=engine.device, requires_grad=True)
    loss = target_loss(predictions, torch.ones(2, 8, device=engine.device), None)
    (grad,) = torch.autograd.grad(loss, predictions)
    assert (loss if kernel == "_forward_kernel" else grad).isnan().all()


def assert_loss_and_gradient(
    engine: Engine, predictions: Tensor, features: Tensor, rows: Tensor | None, **kind: Any
) -> None:
    """The upstream gradient is 3, as a scaled loss has it. The plain twin gets the kernel's inputs in fp32 and in fp64."""
    leaf = predictions.to(engine.device).requires_grad_()
    on_device = None if rows is None else rows.to(engine.device)
    loss = target_loss(leaf, features.to(engine.device), on_device, **kind)
    (grad,) = torch.autograd.grad(3 * loss, leaf)
    plain_rows = torch.arange(len(features)) if rows is None else rows
    losses, grads = [], []
    for dtype in (torch.float32, torch.float64):
        twin = predictions.to(dtype).requires_grad_()
        losses.append(target_loss_reference(twin, features.to(dtype), plain_rows, **kind))
        grads.append(torch.autograd.grad(3 * losses[-1], twin)[0])
    # The twin may be exact by chance on so few numbers, so some units in the last place of fp32 are allowed.
    floors = [max(4e-7, 0.5 * torch.finfo(x.dtype).eps) * x.abs().max().item() for x in (loss, grad)]
    assert_close_to_reference(loss.detach().cpu(), losses[0], losses[1], floor=floors[0])
    assert_close_to_reference(grad.cpu(), grads[0].to(predictions.dtype), grads[1], floor=floors[1])


@simulator_runs(lambda kind: kind in (KINDS[1], KINDS[4]))
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_kind_of_loss_follows_its_plain_twin(engine: Engine, kind: dict[str, Any]) -> None:
    features, rows = 3 * torch.randn(4, 40) + 1, torch.tensor([0, 3, 3, 1, 0, 2])
    assert_loss_and_gradient(engine, 2 * torch.randn(6, 40), features, rows, **kind)


DTYPES = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
]


SIMULATED = [
    (7, torch.float32, torch.float32),
    (384, torch.bfloat16, torch.bfloat16),
    (384, torch.float32, torch.bfloat16),
]


# Widths: one column, unaligned, one block, a last block that is not full, several blocks; 192 to 1408 are ViT-Ti to ViT-g.
@simulator_runs(lambda width, predictions, features: (width, predictions, features) in SIMULATED)
@pytest.mark.parametrize("width", [1, 7, 64, 100, 192, 384, 768, 1280, 1408])
@pytest.mark.parametrize(("predictions", "features"), DTYPES)
def test_dtypes_and_widths(engine: Engine, predictions: torch.dtype, features: torch.dtype, width: int) -> None:
    far_from_0 = (5 + torch.randn(9, width)).to(features)  # the mean square less the squared mean would cancel
    assert_loss_and_gradient(engine, torch.randn(12, width).to(predictions), far_from_0, torch.arange(12) % 5 * 2)


def test_rows_of_wider_tensors(engine: Engine) -> None:
    predictions, features = torch.randn(5, 3 * 64)[:, 64:128], torch.randn(4, 100)[:, 36:]
    assert_loss_and_gradient(engine, predictions, features, torch.tensor([1, 1, 3, 0, 2]))


def test_without_rows_features_are_taken_in_order(engine: Engine) -> None:
    assert_loss_and_gradient(engine, torch.randn(5, 64), torch.randn(5, 64), None)


def test_the_mean_of_nothing_is_nan(engine: Engine) -> None:
    empty = torch.zeros(0, 8, device=engine.device, requires_grad=True)
    rows = torch.zeros(0, dtype=torch.int64, device=engine.device)
    loss = target_loss(empty, torch.zeros(2, 8, device=engine.device), rows)
    assert loss.isnan()
    assert torch.autograd.grad(loss, empty)[0].shape == (0, 8)


@pytest.mark.parametrize("loss", ["smooth_l1", "l2"])
def test_a_nan_is_not_hidden(engine: Engine, loss: Any) -> None:
    predictions, features = torch.randn(2, 2, 64, device=engine.device)
    predictions[1, 3] = math.nan
    predictions.requires_grad_()
    value = target_loss(predictions, features, None, loss=loss)
    (grad,) = torch.autograd.grad(value, predictions)
    assert value.isnan()
    assert torch.equal(grad.isnan(), predictions.isnan())


def test_float64_features_are_refused(engine: Engine) -> None:
    features = torch.zeros(2, 8, dtype=torch.float64, device=engine.device)
    with pytest.raises(ValueError, match="expected no float64"):
        target_loss(features.float(), features, None)


@interpreted_only  # the contracts do not depend on the engine
def test_the_operators_keep_pytorchs_contracts(engine: Engine) -> None:
    ops = import_module("fastjepa_kernels.triton_kernels.target_loss")
    predictions, features, rows = torch.randn(3, 8, requires_grad=True), torch.randn(4, 8), torch.tensor([3, 0, 3])
    for normalize in (True, False):
        args = (predictions, features, rows, "smooth_l1", normalize, 1.0, 1e-5)
        torch.library.opcheck(ops._target_loss, args)
        _, mean, rstd = ops._target_loss(*args)
        upstream = torch.tensor(1.0)
        saved = (upstream, predictions.detach(), features, rows, mean, rstd)
        torch.library.opcheck(ops._target_loss_backward, (*saved, "smooth_l1", normalize, 1.0))


@compiled_only
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_row_is_read_once_and_only_the_gradient_is_written(target: str, dtype: torch.dtype) -> None:
    from benchmarks.proofs.aot.launches import simulated

    tokens, width = 8, 768
    predictions = torch.zeros(tokens, width, dtype=dtype, requires_grad=True)
    with simulated(target) as counts:
        target_loss(predictions, torch.zeros(9, width, dtype=dtype), torch.arange(1, 9)).backward()
    forward, backward = counts
    row_sectors = width * dtype.itemsize // 32
    # Every warp that holds a part of a row reads its index, and in the backward mean, rstd and the upstream gradient.
    warps = 2 if dtype == torch.float32 else 1
    assert forward["global_sectors"]["load"] - 2 * tokens * row_sectors <= tokens * warps
    assert backward["global_sectors"]["load"] - 2 * tokens * row_sectors <= 4 * tokens * warps
    assert forward["useful_bytes"]["store"] == 3 * 4 * tokens
    assert backward["global_sectors"]["store"] == tokens * row_sectors
    # Each thread moves 16 bytes, or there would be more requests.
    assert backward["global_requests"]["store"] == tokens * row_sectors // 16
