"""Schedules against the text, parameter groups, flat buffers, and the pairing of weights with their average."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

from fastjepa.config import OptimConfig
from fastjepa.objectives.ijepa.objective import IJEPA, build_model
from fastjepa.optim.adamw_ema import AdamWEMA
from fastjepa.optim.groups import flatten_groups, param_groups
from fastjepa.optim.schedule import Schedule, set_schedule
from tests.support.small import small_batch, small_config

GROUPS = [f"{part}_{kind}" for part in ("encoder", "predictor", "target") for kind in ("decay", "no_decay")]


@pytest.fixture
def model() -> IJEPA:
    return build_model(small_config())


@pytest.mark.parametrize("scale", [1.0, 1.25])
@pytest.mark.parametrize("warmup_epochs", [0.0, 3.0])
def test_schedules_follow_the_text(scale: float, warmup_epochs: float) -> None:
    """A loop over the run, as it is written: the scheduler steps before the optimizer, the momentum after it."""
    config = OptimConfig(warmup_epochs=warmup_epochs, ema_momentum=(0.9, 1.0), schedule_scale=scale)
    steps_per_epoch, total = 10, 120
    horizon, warmup = total * scale, warmup_epochs * steps_per_epoch
    momentum = 0.9
    for step, scheduler in enumerate(range(1, total + 1)):
        if scheduler < warmup:
            lr = 2e-4 + scheduler * (1e-3 - 2e-4) / warmup
        else:
            turn = math.cos(math.pi * (scheduler - warmup) / (horizon - warmup))
            lr = 1e-6 + (1e-3 - 1e-6) * (1 + turn) / 2
        decay = 0.4 + (0.04 - 0.4) * (1 + math.cos(math.pi * scheduler / horizon)) / 2
        expected = {"lr": lr, "weight_decay": decay, "ema_momentum": momentum}
        assert Schedule(config, steps_per_epoch, total).at(step) == pytest.approx(expected, rel=1e-12)
        momentum += (1.0 - 0.9) / horizon


def test_schedules_begin_peak_and_end_at_their_settings() -> None:
    schedule = Schedule(OptimConfig(warmup_epochs=2), steps_per_epoch=10, total_steps=100)
    assert schedule.at(0)["ema_momentum"] == 0.996
    assert schedule.at(0)["lr"] == pytest.approx(2e-4 + 8e-4 / 20)
    assert schedule.at(19)["lr"] == 1e-3 == max(schedule.at(step)["lr"] for step in range(100))
    assert schedule.at(99)["lr"] == pytest.approx(1e-6)
    assert schedule.at(99)["weight_decay"] == pytest.approx(0.4)
    assert schedule.at(99)["ema_momentum"] == pytest.approx(1 - 0.004 / 100)


def test_a_stretched_schedule_is_cut_at_the_end_of_the_run() -> None:
    config = OptimConfig(warmup_epochs=0, schedule_scale=1.25, ema_momentum=(0.9, 1.0))
    last = Schedule(config, steps_per_epoch=10, total_steps=100).at(99)
    assert last["lr"] == pytest.approx(1e-6 + (1e-3 - 1e-6) * (1 + math.cos(0.8 * math.pi)) / 2)
    assert last["ema_momentum"] == pytest.approx(0.9 + 0.1 * 99 / 125)


def test_a_warm_up_longer_than_the_run_never_reaches_the_peak() -> None:
    schedule = Schedule(OptimConfig(warmup_epochs=40), steps_per_epoch=10, total_steps=100)
    assert [schedule.at(step)["lr"] for step in (0, 99)] == pytest.approx([2e-4 + 8e-4 / 400, 2e-4 + 8e-4 / 4])


def test_every_parameter_is_in_exactly_one_group(model: IJEPA) -> None:
    groups = param_groups(model)
    named = [(n, p) for group in groups for n, p in zip(group["names"], group["params"], strict=True)]
    assert [group["name"] for group in groups] == GROUPS
    assert len(named) == len(dict(named)) == len({id(p) for _, p in named})
    assert dict(named) == dict(model.named_parameters())


def test_biases_and_vectors_do_not_decay_and_the_mask_token_does(model: IJEPA) -> None:
    decays = {name: group["decay"] for group in param_groups(model) for name in group["names"]}
    assert decays["predictor.mask_token"]
    for name, parameter in model.named_parameters():
        assert decays[name] == (parameter.ndim > 1), name
        assert not (decays[name] and name.endswith(".bias")), name


def test_targets_follow_their_sources_in_the_same_order(model: IJEPA) -> None:
    groups = {group["name"]: group for group in param_groups(model)}
    assert {name: group["ema_of"] for name, group in groups.items() if group["ema_of"]} == {
        "target_decay": "encoder_decay",
        "target_no_decay": "encoder_no_decay",
    }
    for kind in ("decay", "no_decay"):
        target, source = groups[f"target_{kind}"], groups[f"encoder_{kind}"]
        assert GROUPS.index(f"encoder_{kind}") < GROUPS.index(f"target_{kind}")
        assert [n.removeprefix("target_encoder.") for n in target["names"]] == [
            n.removeprefix("context_encoder.") for n in source["names"]
        ]


def test_the_schedule_is_written_into_all_groups_but_not_the_decay_where_there_is_none(model: IJEPA) -> None:
    groups = param_groups(model)
    set_schedule(groups, {"lr": 0.5, "weight_decay": 0.25, "ema_momentum": 0.75})
    for group in groups:
        decay = 0.0 if group["name"].endswith("no_decay") else 0.25
        assert (group["lr"], group["weight_decay"], group["ema_momentum"]) == (0.5, decay, 0.75)


def test_flat_groups_hold_the_weights_and_collect_the_gradients(model: IJEPA) -> None:
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    images_and_masks = small_batch(model.config)
    model(*images_and_masks).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    groups = param_groups(model)
    members = {group["name"]: dict(zip(group["names"], group["params"], strict=True)) for group in groups}
    flatten_groups(groups)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    for _ in range(2):
        model(*images_and_masks).backward()
    for group in groups:
        (flat,) = group["params"]
        total = sum(p.numel() for p in members[group["name"]].values())
        assert flat.numel() % 16 == 0
        assert 0 <= flat.numel() - total < 16
        assert not flat[total:].any()
        for name, parameter in members[group["name"]].items():
            assert parameter.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()
            if group["ema_of"]:
                assert parameter.grad is None
                assert flat.grad is None
            else:
                first = parameter.storage_offset()
                collected = flat.grad[first : first + parameter.numel()].view_as(parameter)
                torch.testing.assert_close(collected, 2 * gradients[name])


def test_padding_stays_zero_through_a_step(model: IJEPA) -> None:
    groups = param_groups(model)
    totals = {group["name"]: sum(p.numel() for p in group["params"]) for group in groups}
    flatten_groups(groups)
    optimizer = AdamWEMA(groups, OptimConfig())
    optimizer.bind({group["name"]: group["params"] for group in groups}, lambda: torch.ones(()))
    set_schedule(optimizer.param_groups, {"lr": 0.1, "weight_decay": 0.4, "ema_momentum": 0.5})
    model(*small_batch(model.config)).backward()
    optimizer.step()
    assert optimizer.updates == 1
    assert any(group["params"][0].numel() > totals[group["name"]] for group in groups)  # else nothing is checked below
    for group in groups:
        assert not group["params"][0][totals[group["name"]] :].any(), group["name"]


def stepped(model: IJEPA, clip_grad: float | None = None, *, group_by_group: bool = False) -> AdamWEMA:
    """Two steps of a gradient norm of 64 (so it is said), each with other gradients and another schedule."""
    groups = param_groups(model)
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


def test_each_step_uses_the_schedule_of_that_step(model: IJEPA) -> None:
    """Against torch.optim.AdamW and a plain average."""
    groups = {group["name"]: group for group in param_groups(copy.deepcopy(model))}
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


def test_gradients_are_clipped_as_they_are_read(model: IJEPA) -> None:
    """Adam's update does not depend on the gradient's scale, but its moments do: powers of two are exact."""
    twin = copy.deepcopy(model)
    plain, scaled = stepped(model), stepped(twin, clip_grad=32.0)
    for state, half in zip(plain.state.values(), scaled.state.values(), strict=True):
        assert torch.equal(half["exp_avg"], 0.5 * state["exp_avg"])
        assert torch.equal(half["exp_avg_sq"], 0.25 * state["exp_avg_sq"])


def test_group_by_group_as_zero_calls_it_is_the_same_and_counts_once(model: IJEPA) -> None:
    twin = copy.deepcopy(model)
    whole, apart = stepped(model), stepped(twin, group_by_group=True)
    assert whole.updates == apart.updates == 2
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_the_count_goes_on_where_a_checkpoint_left_it(model: IJEPA) -> None:
    optimizer = stepped(model)
    optimizer.updates = 41
    assert optimizer.updates == 41
    optimizer.step()
    assert optimizer.updates == 42
    assert set(optimizer.moments(optimizer.param_groups[0]["params"][0])) == {"exp_avg", "exp_avg_sq"}


def test_weights_without_gradients_and_their_average_stay(model: IJEPA) -> None:
    groups = param_groups(model)
    optimizer = AdamWEMA(groups, OptimConfig())
    optimizer.bind({group["name"]: group["params"] for group in groups}, lambda: torch.ones(()))
    torch.nn.init.zeros_(model.target_encoder.norm.weight)
    set_schedule(optimizer.param_groups, {"lr": 0.1, "weight_decay": 0.4, "ema_momentum": 0.5})
    optimizer.step()
    assert optimizer.updates == 0
    assert bool((model.context_encoder.norm.weight == 1).all())
    assert not model.target_encoder.norm.weight.any()


def test_a_target_of_another_layout_is_refused(model: IJEPA) -> None:
    groups = param_groups(model)
    optimizer = AdamWEMA(groups, OptimConfig())
    tensors = {group["name"]: group["params"] for group in groups}
    with pytest.raises(ValueError, match="target_decay is not laid out as encoder_decay"):
        optimizer.bind({**tensors, "target_decay": tensors["target_decay"][::-1]}, lambda: torch.ones(()))
