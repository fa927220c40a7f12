"""The fused optimizer step equals torch.optim.AdamW and a plain average; an average in bf16 would lose its updates."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch

from fastjepa_kernels import request
from fastjepa_kernels.adamw_ema import adamw_ema_
from fastjepa_kernels.reference import adamw_ema_reference
from fastjepa_kernels.selection import apex_problem
from tests.support.accuracy import assert_close_to_reference

HYPER: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1, "ema_momentum": 0.99}


def state_of(n: int, dtype: torch.dtype = torch.float32, grad_dtype: torch.dtype | None = None) -> dict[str, Any]:
    """The tensors of an update in mid-training, by the names of the arguments and in their order."""
    generator = torch.Generator().manual_seed(n)
    values = [torch.randn(n, generator=generator, dtype=dtype) for _ in range(5)]
    state = dict(zip(("param", "grad", "exp_avg", "exp_avg_sq", "ema"), values, strict=True))
    state["exp_avg_sq"] = state["exp_avg_sq"].square()
    state["grad"] = state["grad"].to(grad_dtype or dtype)
    return state


def test_many_steps_equal_torch_adamw_and_a_plain_average() -> None:
    generator = torch.Generator().manual_seed(0)
    state = state_of(257, torch.float64)
    state["exp_avg"].zero_()
    state["exp_avg_sq"].zero_()
    expected = {name: x.clone() for name, x in state.items()}
    for step in range(1, 21):
        state["grad"] = expected["grad"] = torch.randn(257, generator=generator, dtype=torch.float64)
        adamw_ema_(**state, **HYPER, step=step)
        results = adamw_ema_reference(**expected, **HYPER, step=step)
        expected |= dict(zip(("param", "exp_avg", "exp_avg_sq", "ema"), results, strict=True))
    torch.testing.assert_close(state, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [1, 15, 16, 17, 1000])
def test_any_size_and_gradient_dtype_with_scaled_gradients_and_copies(
    n: int, grad_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.import_module("fastjepa_kernels.adamw_ema"), "_CHUNK", 16)
    state = state_of(n, grad_dtype=grad_dtype)
    before = {name: x.clone() for name, x in state.items()}
    param_copy = torch.full((n,), math.nan, dtype=torch.bfloat16)
    ema_copy = torch.full((n,), math.nan, dtype=torch.float16)
    hyper = {**HYPER, "step": 7}
    adamw_ema_(**state, **hyper, grad_scale=torch.tensor(0.3), param_copy=param_copy, ema_copy=ema_copy)
    plain = adamw_ema_reference(**before, **hyper, grad_scale=0.3)
    exact = adamw_ema_reference(**{name: x.double() for name, x in before.items()}, **hyper, grad_scale=0.3)
    for name, same_dtype, truth in zip(("param", "exp_avg", "exp_avg_sq", "ema"), plain, exact, strict=True):
        assert_close_to_reference(state[name], same_dtype, truth)
    assert torch.equal(state["grad"], before["grad"])
    assert torch.equal(param_copy, state["param"].bfloat16())
    assert torch.equal(ema_copy, state["ema"].half())


def test_without_an_average_the_weights_are_the_same() -> None:
    with_average, alone = state_of(20), state_of(20)
    adamw_ema_(**with_average, **HYPER, step=3)
    untouched = alone.pop("ema").clone()
    adamw_ema_(**alone, ema=None, **HYPER, step=3)
    assert all(torch.equal(alone[name], with_average[name]) for name in alone)
    assert not torch.equal(with_average["ema"], untouched)


@pytest.mark.parametrize("found", [1.0, math.inf, math.nan])
def test_nothing_changes_after_an_overflow(found: float) -> None:
    state = state_of(20)
    copy = torch.full((20,), 3.0).bfloat16()
    before = {name: x.clone() for name, x in state.items()}
    adamw_ema_(**state, **HYPER, step=3, found_inf=torch.tensor(found), param_copy=copy)
    assert all(torch.equal(state[name], before[name]) for name in state)
    assert bool((copy == 3).all())
    adamw_ema_(**state, **HYPER, step=3, found_inf=torch.tensor(0.0), param_copy=copy)
    assert torch.equal(copy, state["param"].bfloat16())
    assert not torch.equal(state["param"], before["param"])


def test_hyper_parameters_may_be_tensors() -> None:
    numbers, tensors = state_of(20), state_of(20)
    adamw_ema_(**numbers, **HYPER, step=3)
    sent = {name: torch.tensor(HYPER[name], dtype=torch.float64) for name in ("lr", "weight_decay", "ema_momentum")}
    adamw_ema_(**tensors, **HYPER | sent, step=torch.tensor(3))
    assert all(torch.equal(tensors[name], numbers[name]) for name in numbers)


@pytest.mark.parametrize(("momentum", "lost"), [(0.99, 0.3), (0.9996, 0.9)])
def test_an_average_in_bf16_would_lose_updates_that_ours_keeps(momentum: float, lost: float) -> None:
    """Follow a drifting weight for 500 steps and hold the average's displacement to that in fp64."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4096, generator=generator)
    drift = 1e-4 * torch.randn(4096, generator=generator)
    ours, exact, bf16 = weight.clone(), weight.double(), weight.bfloat16()
    start, start_bf16 = exact.clone(), bf16.double()
    moments = torch.zeros(2, 4096)
    frozen: dict[str, Any] = {**HYPER, "lr": 0.0, "weight_decay": 0.0, "ema_momentum": momentum}
    for step in range(1, 501):
        weight = weight + drift
        adamw_ema_(weight, drift, moments[0], moments[1], ours, step=step, **frozen)
        exact.lerp_(weight.double(), 1 - momentum)
        bf16.lerp_(weight.bfloat16(), 1 - momentum)
    displacement = (exact - start).norm()
    assert (ours.double() - exact).norm() / displacement < 0.01
    assert (bf16.double() - start_bf16 - (exact - start)).norm() / displacement > lost


X = torch.zeros(4)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"ema": X.bfloat16()}, r"ema is torch.bfloat16 \(4,\) on cpu, expected float32 \(4,\) on cpu"),
        ({"param": X.long()}, r"param is torch.int64 \(4,\) on cpu, expected float32"),
        ({"exp_avg": X[:3]}, r"exp_avg is torch.float32 \(3,\) on cpu, expected float32 \(4,\)"),
        ({"exp_avg_sq": X.double()}, r"exp_avg_sq is torch.float64"),
        ({"grad": X.int()}, r"grad is torch.int32 .*, expected float32 or bfloat16 or float16"),
        ({"grad": X.to("meta")}, r"grad is torch.float32 \(4,\) on meta, expected .* on cpu"),
        ({"grad": torch.zeros(8)[::2]}, r"grad has strides \(2,\), expected contiguous \(4,\)"),
        ({"param_copy": X}, r"param_copy is torch.float32 .*, expected bfloat16 or float16"),
        ({"ema_copy": X.half()[:2]}, r"ema_copy is torch.float16 \(2,\)"),
        ({"ema": None, "ema_copy": X.half()}, "got ema_copy without ema"),
        ({"lr": torch.zeros(1)}, r"lr is \(1,\) on cpu, expected \(\) on cpu"),
        ({"found_inf": torch.zeros((), device="meta")}, r"found_inf is \(\) on meta, expected \(\) on cpu"),
        ({"step": 0}, "step is 0, expected the number of this update, from 1"),
        ({"betas": (0.9, 1.0)}, r"betas are \(0.9, 1.0\), expected two numbers in \[0, 1\)"),
    ],
)
def test_wrong_arguments_are_refused_by_name(wrong: dict[str, Any], message: str) -> None:
    right = dict.fromkeys(("param", "grad", "exp_avg", "exp_avg_sq", "ema"), X)
    with pytest.raises(ValueError, match=f"adamw_ema_: {message}"):
        adamw_ema_(**{**right, **HYPER, "step": 1, **wrong})


@pytest.mark.gpu
@pytest.mark.skipif(apex_problem() is not None, reason="needs NVIDIA apex")
def test_apex_follows_the_reference() -> None:
    request({"adamw_ema": "apex"})
    try:
        state = {name: x.cuda() for name, x in state_of(1000).items()}
        before: dict[str, Any] = {name: x.cpu().double() for name, x in state.items()}
        adamw_ema_(**state, **HYPER, step=7, grad_scale=torch.tensor(0.3, device="cuda"))
        before = {name: x.clone() for name, x in state.items()}
        adamw_ema_(**state, **HYPER, step=8, found_inf=torch.ones((), device="cuda"))
        assert all(torch.equal(x, before[name]) for name, x in state.items())
    finally:
        request({})
    exact = adamw_ema_reference(**before, **HYPER, step=7, grad_scale=0.3)
    for name, truth in zip(("param", "exp_avg", "exp_avg_sq", "ema"), exact, strict=True):
        # apex computes 1 - beta in fp32.
        torch.testing.assert_close(state[name].cpu().double(), truth, rtol=1e-4, atol=1e-6)
