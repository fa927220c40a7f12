"""The target loss on PyTorch against its plain twin and PyTorch's own losses."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fastjepa_kernels.reference import target_loss_reference
from fastjepa_kernels.target_loss import target_loss
from tests.support.accuracy import assert_close_to_reference

KINDS: list[dict[str, Any]] = [
    {},
    {"beta": 0.25},
    {"normalize": False},
    {"loss": "l2"},
    {"loss": "l2", "normalize": False},
    {"eps": 0.5},
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@given(st.data())
@settings(deadline=None, max_examples=20)
def test_any_loss_and_its_gradient_equal_those_of_the_plain_twin(kind: dict[str, Any], data: st.DataObject) -> None:
    num_features, width = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 9))
    rows = torch.tensor(data.draw(st.lists(st.integers(0, num_features - 1), min_size=1, max_size=20)))
    features = 3 * torch.randn(num_features, width, dtype=torch.float64) + 1
    predictions = torch.randn(len(rows), width, dtype=torch.float64, requires_grad=True)
    loss, plain = (
        target_loss(predictions, features, rows, **kind),
        target_loss_reference(predictions, features, rows, **kind),
    )
    torch.testing.assert_close(loss, plain, rtol=1e-12, atol=1e-12)
    gradients = (torch.autograd.grad(3 * x, predictions)[0] for x in (loss, plain))
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_gradient_is_the_derivative(kind: dict[str, Any]) -> None:
    features, rows = torch.randn(4, 6, dtype=torch.float64), torch.tensor([0, 3, 3, 1, 0])
    predictions = 2 * torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: target_loss(x, features, rows, **kind), predictions)


@pytest.mark.parametrize("predictions_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("features_dtype", [torch.bfloat16, torch.float32])
def test_half_precision_inputs_are_computed_in_fp32(
    predictions_dtype: torch.dtype, features_dtype: torch.dtype
) -> None:
    # The bound is the error of the twin's one number. With one seed in twenty-five that is exact by chance, or nearly.
    torch.manual_seed(1)
    predictions, features = torch.randn(40, 96).to(predictions_dtype), (5 + torch.randn(30, 96)).to(features_dtype)
    rows = torch.randint(30, (40,))
    plain, exact = (
        target_loss_reference(predictions.to(t), features.to(t), rows) for t in (torch.float32, torch.float64)
    )
    assert_close_to_reference(target_loss(predictions, features, rows), plain, exact)


def test_without_rows_features_are_taken_in_order() -> None:
    predictions, features = torch.randn(2, 7, 5)
    assert target_loss(predictions, features, None) == target_loss(predictions, features, torch.arange(7))


@pytest.mark.parametrize("loss", ["smooth_l1", "l2"])
def test_the_mean_of_nothing_is_nan_as_in_pytorch(loss: Any) -> None:
    empty = torch.zeros(0, 4)
    plain = {"smooth_l1": F.smooth_l1_loss, "l2": F.mse_loss}[loss](empty, empty)
    assert math.isnan(plain)
    assert math.isnan(target_loss(empty, torch.zeros(3, 4), torch.zeros(0, dtype=torch.int64), loss=loss))


TOKENS, ROWS = torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: target_loss(TOKENS[0], TOKENS, ROWS), r"predictions has shape \(4,\)"),
        (lambda: target_loss(TOKENS, TOKENS.T, ROWS), r"features has shape \(4, 3\) and strides \(1, 4\)"),
        (lambda: target_loss(TOKENS, TOKENS[:, :2], ROWS), r"features are \(3, 2\) on cpu, expected \[R, 4\]"),
        (lambda: target_loss(TOKENS, TOKENS.to("meta"), ROWS), r"features are .* on meta, expected \[R, 4\] on cpu"),
        (lambda: target_loss(TOKENS, TOKENS.int(), ROWS), "int32, expected floating"),
        (lambda: target_loss(TOKENS, TOKENS.clone().requires_grad_(), ROWS), "features require a gradient"),
        (lambda: target_loss(TOKENS, TOKENS, ROWS.int()), "rows are torch.int32"),
        (lambda: target_loss(TOKENS, TOKENS, ROWS[:2]), "got 2 targets, expected one for each of 3 predictions"),
        (lambda: target_loss(TOKENS[:2], TOKENS, None), "got 3 targets, expected one for each of 2 predictions"),
        (lambda: target_loss(TOKENS, TOKENS, ROWS, beta=0.0), "beta is 0.0, expected a positive number"),
        (lambda: target_loss(TOKENS, TOKENS, ROWS, loss="l1"), "loss is 'l1', expected smooth_l1 or l2"),  # type: ignore[arg-type]
    ],
)
def test_arguments_that_do_not_fit_are_refused_by_name(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
