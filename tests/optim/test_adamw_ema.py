"""AdamW with the EMA of a source group: each step against torch.optim.AdamW and a plain average."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from fastjepa.config import OptimConfig
from fastjepa.objectives.ijepa.objective import IJEPAObjective
from fastjepa.optim.adamw_ema import AdamWEMA
from fastjepa.optim.groups import flatten_groups, param_groups
from fastjepa.optim.schedule import set_schedule
from tests.support.small import build_ijepa, small_batch, small_config


@pytest.fixture
def model() -> IJEPAObjective:
    return build_ijepa(small_config())


def test_padding_stays_zero_through_a_step(model: IJEPAObjective) -> None:
    groups = param_groups(model.parts)
    totals = {group["name"]: sum(p.numel() for p in group["params"]) for group in groups}
    flatten_groups(groups)
    optimizer = AdamWEMA(groups, OptimConfig())
    optimizer.bind({group["name"]: group["params"] for group in groups}, lambda: torch.ones(()))
    set_schedule(optimizer.param_groups, {"lr": 0.1, "weight_decay": 0.4, "ema_momentum": 0.5})
    model(small_batch(model.config)).loss.backward()
    optimizer.step()
    assert optimizer.updates == 1
    assert any(
        group["params"][0].numel() > totals[group["name"]] for group in groups
    )  # otherwise nothing is checked below
    for group in groups:
        assert not group["params"][0][totals[group["name"]] :].any(), group["name"]


def stepped(model: IJEPAObjective, clip_grad: float | None = None, *, group_by_group: bool = False) -> AdamWEMA:
    """Take two steps, each with its own gradients and schedule. The optimizer is told that their norm is 64."""
    groups = param_groups(model.parts)
    flatten_groups(groups)
    optimizer = AdamWEMA(groups, OptimConfig(clip_grad=clip_grad))
    optimizer.bind({group["name"]: group["params"] for group in groups}, lambda: torch.tensor(64.0))
    every = optimizer.param_groups
    for step in range(2):
        set_schedule(every, schedule_values(step))
        for group in every:
            if not group["ema_of"]:
                group["params"][0].grad.copy_(gradient(group["params"][0], step))
        for some in [[group] for group in every] if group_by_group else [every]:
            optimizer.param_groups = some
            optimizer.step()
        optimizer.param_groups = every
    return optimizer


def schedule_values(step: int) -> dict[str, float]:
    return {"lr": 0.1 / (step + 1), "weight_decay": 0.4 - 0.1 * step, "ema_momentum": 0.5 + 0.1 * step}


def gradient(param: Tensor, step: int) -> Tensor:
    return torch.randn(param.shape, generator=torch.Generator().manual_seed(step))


def test_each_step_uses_the_schedule_of_that_step(model: IJEPAObjective) -> None:
    """The reference is torch.optim.AdamW and a plain average."""
    groups = {group["name"]: group for group in param_groups(copy.deepcopy(model).parts)}
    flatten_groups(list(groups.values()))
    starts = {name: group["params"][0].detach() for name, group in groups.items()}
    ends = {group["name"]: group["params"][0].detach() for group in stepped(model).param_groups}
    averages = {group["ema_of"]: name for name, group in groups.items() if group["ema_of"]}
    for name in [name for name, group in groups.items() if not group["ema_of"]]:
        weight = torch.nn.Parameter(starts[name].clone())
        average = starts[averages[name]].clone() if name in averages else None
        optimizer = torch.optim.AdamW([weight], betas=OptimConfig().betas)
        for step in range(2):
            values = schedule_values(step)
            optimizer.param_groups[0]["lr"] = values["lr"]
            optimizer.param_groups[0]["weight_decay"] = values["weight_decay"] if groups[name]["decay"] else 0.0
            weight.grad = gradient(weight, step)
            optimizer.step()
            if average is not None:
                average.lerp_(weight.detach(), 1 - values["ema_momentum"])
        torch.testing.assert_close(ends[name], weight.detach())
        if average is not None:
            torch.testing.assert_close(ends[averages[name]], average)


def test_gradients_are_clipped_when_the_step_reads_them(model: IJEPAObjective) -> None:
    """Adam's update does not depend on the gradient's scale, but its moments do. Scaling by a power of two is exact."""
    twin = copy.deepcopy(model)
    plain, scaled = stepped(model), stepped(twin, clip_grad=32.0)
    for state, half in zip(plain.state.values(), scaled.state.values(), strict=True):
        assert torch.equal(half["exp_avg"], 0.5 * state["exp_avg"])
        assert torch.equal(half["exp_avg_sq"], 0.25 * state["exp_avg_sq"])


def test_stepping_group_by_group_as_zero_does_gives_the_same_weights_and_count(
    model: IJEPAObjective,
) -> None:
    twin = copy.deepcopy(model)
    whole, apart = stepped(model), stepped(twin, group_by_group=True)
    assert whole.updates == apart.updates == 2
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_the_count_of_updates_continues_from_the_value_of_a_checkpoint(model: IJEPAObjective) -> None:
    optimizer = stepped(model)
    optimizer.updates = 41
    assert optimizer.updates == 41
    optimizer.step()
    assert optimizer.updates == 42
    assert set(optimizer.moments(optimizer.param_groups[0]["params"][0])) == {"exp_avg", "exp_avg_sq"}


def test_weights_without_gradients_and_their_ema_stay_unchanged(model: IJEPAObjective) -> None:
    groups = param_groups(model.parts)
    optimizer = AdamWEMA(groups, OptimConfig())
    optimizer.bind({group["name"]: group["params"] for group in groups}, lambda: torch.ones(()))
    torch.nn.init.zeros_(model.target_encoder.norm.weight)
    set_schedule(optimizer.param_groups, {"lr": 0.1, "weight_decay": 0.4, "ema_momentum": 0.5})
    optimizer.step()
    assert optimizer.updates == 0
    assert bool((model.context_encoder.norm.weight == 1).all())
    assert not model.target_encoder.norm.weight.any()


def test_an_average_with_another_layout_than_its_source_is_refused(model: IJEPAObjective) -> None:
    groups = param_groups(model.parts)
    optimizer = AdamWEMA(groups, OptimConfig())
    tensors = {group["name"]: group["params"] for group in groups}
    with pytest.raises(ValueError, match="target_encoder_decay is not laid out as context_encoder_decay"):
        optimizer.bind(
            {**tensors, "target_encoder_decay": tensors["target_encoder_decay"][::-1]}, lambda: torch.ones(())
        )
