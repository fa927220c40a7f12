"""Schedules of learning rate, weight decay and EMA momentum, as the paper and the official code have them."""

from __future__ import annotations

import math

import pytest

from fastjepa.config import OptimConfig
from fastjepa.optim.groups import param_groups
from fastjepa.optim.schedule import Schedule, set_schedule
from tests.support.small import build_ijepa, small_config


@pytest.mark.parametrize("scale", [1.0, 1.25])
@pytest.mark.parametrize("warmup_epochs", [0.0, 3.0])
def test_schedules_follow_the_paper_and_the_official_code(scale: float, warmup_epochs: float) -> None:
    """The reference is the loop of the official code: the scheduler steps before the optimizer, the momentum after it."""
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


def test_the_schedule_is_written_into_all_groups_and_weight_decay_only_where_a_group_decays() -> None:
    groups = param_groups(build_ijepa(small_config()).parts)
    set_schedule(groups, {"lr": 0.5, "weight_decay": 0.25, "ema_momentum": 0.75})
    for group in groups:
        decay = 0.0 if group["name"].endswith("no_decay") else 0.25
        assert (group["lr"], group["weight_decay"], group["ema_momentum"]) == (0.5, decay, 0.75)
