"""Parameter groups: every parameter is in one, averages are paired with their sources, and flat buffers hold a group."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastjepa.objectives.base import Part
from fastjepa.objectives.ijepa.objective import IJEPAObjective
from fastjepa.optim.groups import flatten_groups, param_groups
from tests.support.small import build_ijepa, small_batch, small_config

GROUPS = [
    f"{part}_{kind}" for part in ("context_encoder", "predictor", "target_encoder") for kind in ("decay", "no_decay")
]


@pytest.fixture
def model() -> IJEPAObjective:
    return build_ijepa(small_config())


def test_every_parameter_is_in_exactly_one_group(model: IJEPAObjective) -> None:
    groups = param_groups(model.parts)
    named = [(n, p) for group in groups for n, p in zip(group["names"], group["params"], strict=True)]
    assert [group["name"] for group in groups] == GROUPS
    assert len(named) == len(dict(named)) == len({id(p) for _, p in named})
    assert dict(named) == dict(model.named_parameters())


def test_biases_and_vectors_do_not_decay_and_the_mask_token_does(model: IJEPAObjective) -> None:
    decays = {name: group["decay"] for group in param_groups(model.parts) for name in group["names"]}
    assert decays["predictor.mask_token"]
    for name, parameter in model.named_parameters():
        assert decays[name] == (parameter.ndim > 1), name
        assert not (decays[name] and name.endswith(".bias")), name


def test_groups_of_the_target_encoder_follow_their_sources_and_have_the_same_order(model: IJEPAObjective) -> None:
    groups = {group["name"]: group for group in param_groups(model.parts)}
    assert {name: group["ema_of"] for name, group in groups.items() if group["ema_of"]} == {
        "target_encoder_decay": "context_encoder_decay",
        "target_encoder_no_decay": "context_encoder_no_decay",
    }
    for kind in ("decay", "no_decay"):
        target, source = groups[f"target_encoder_{kind}"], groups[f"context_encoder_{kind}"]
        assert GROUPS.index(f"context_encoder_{kind}") < GROUPS.index(f"target_encoder_{kind}")
        assert [n.removeprefix("target_encoder.") for n in target["names"]] == [
            n.removeprefix("context_encoder.") for n in source["names"]
        ]


def test_flat_groups_hold_the_weights_and_accumulate_the_gradients(model: IJEPAObjective) -> None:
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    batch = small_batch(model.config)
    model(batch).loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    groups = param_groups(model.parts)
    members = {group["name"]: dict(zip(group["names"], group["params"], strict=True)) for group in groups}
    flatten_groups(groups)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    for _ in range(2):
        model(batch).loss.backward()
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


def test_a_group_without_parameters_is_left_out() -> None:
    part = Part("head", nn.Linear(2, 3, bias=False))
    assert [group["name"] for group in param_groups([part])] == ["head_decay"]
