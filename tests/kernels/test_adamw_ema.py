"""The fused optimizer step: equal to torch.optim.AdamW and a plain average; and why the average is kept in fp32."""

import pytest
import torch

from fastjepa_kernels import adamw_ema_
from fastjepa_kernels.reference import adamw_ema_reference

HYPER = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1, "ema_momentum": 0.99}


def test_many_steps_equal_torch_adamw_and_a_plain_average() -> None:
    generator = torch.Generator().manual_seed(0)
    param, ema = (torch.randn(257, generator=generator, dtype=torch.float64) for _ in range(2))
    grads = [torch.randn(257, generator=generator, dtype=torch.float64) for _ in range(20)]
    expected = adamw_ema_reference(param, ema, grads, **HYPER)  # type: ignore[arg-type]
    exp_avg, exp_avg_sq = torch.zeros_like(param), torch.zeros_like(param)
    for step, grad in enumerate(grads, start=1):
        adamw_ema_(param, grad, exp_avg, exp_avg_sq, ema, step=step, **HYPER)  # type: ignore[arg-type]
    torch.testing.assert_close((param, ema), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("momentum", "lost"), [(0.99, 0.3), (0.9996, 0.9)])
def test_an_average_kept_in_bf16_loses_its_updates_and_ours_does_not(momentum: float, lost: float) -> None:
    """500 steps of a drifting weight: relative error of the average's displacement against fp64."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4096, generator=generator)
    drift = 1e-4 * torch.randn(4096, generator=generator)
    ours, exact, bf16 = weight.clone(), weight.double(), weight.bfloat16()
    start, start_bf16 = exact.clone(), bf16.double()
    moments = torch.zeros(2, 4096)
    for step in range(1, 501):
        weight = weight + drift
        frozen = {"step": step, "lr": 0.0, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
        adamw_ema_(weight, drift, moments[0], moments[1], ours, ema_momentum=momentum, **frozen)  # type: ignore[arg-type]
        exact.lerp_(weight.double(), 1 - momentum)
        bf16.lerp_(weight.bfloat16(), 1 - momentum)
    displacement = (exact - start).norm()
    assert (ours.double() - exact).norm() / displacement < 0.01
    assert (bf16.double() - start_bf16 - (exact - start)).norm() / displacement > lost


def test_a_half_precision_average_is_refused() -> None:
    x = torch.zeros(4)
    with pytest.raises(ValueError, match=r"ema is torch.bfloat16 \(4,\), expected float32"):
        adamw_ema_(x, x, x.clone(), x.clone(), x.bfloat16(), step=1, **HYPER)  # type: ignore[arg-type]
