"""Methods are found by name, and settings are read as this version and earlier ones wrote them."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, replace
from typing import Any

import pytest
import torch

from fastjepa.config import Config, ObjectiveConfig
from fastjepa.errors import ConfigError
from fastjepa.objectives import registry
from fastjepa.objectives.ijepa.block_sizes import MaskConfig
from fastjepa.objectives.ijepa.method import IJEPA
from fastjepa.objectives.ijepa.settings import IJEPAConfig, Savings
from tests.support.small import build_ijepa, small_config


@dataclass(frozen=True, kw_only=True)
class OtherConfig(ObjectiveConfig):
    name: str = "other"
    strength: float = 0.5


class Other(IJEPA):
    """I-JEPA under another name and with other settings."""

    def __init__(self, config: Config) -> None:
        super().__init__(replace(config, objective=IJEPAConfig()))


@pytest.fixture
def other_is_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    registry.register("other", OtherConfig, Other)


def test_an_unknown_name_is_refused_with_the_names_that_there_are() -> None:
    with pytest.raises(ConfigError, match=r"^objective\.name = nonsense: expected one of: ijepa$"):
        registry.settings_class("nonsense")


def test_the_default_method_is_i_jepa() -> None:
    config = registry.load_config(None)
    assert config.objective == IJEPAConfig()
    assert isinstance(registry.method_of(config), IJEPA)


@pytest.mark.usefixtures("other_is_registered")
def test_a_registered_method_is_found_by_its_name_with_its_own_settings() -> None:
    config = registry.load_config(None, ["objective.strength=0.25", "objective.name=other"])
    assert config.objective == OtherConfig(strength=0.25)
    assert isinstance(registry.method_of(config), Other)
    with pytest.raises(ConfigError, match=r"unknown key objective\.strength"):
        registry.load_config(None, ["objective.strength=0.25"])
    with pytest.raises(ConfigError, match=r"expected one of: ijepa, other$"):
        registry.settings_class("nonsense")


def test_initial_weights_are_a_function_of_the_seed_alone() -> None:
    first = build_ijepa(small_config())
    torch.manual_seed(99)
    state = torch.get_rng_state()
    second, other = build_ijepa(small_config()), build_ijepa(small_config(seed=1))
    assert torch.equal(torch.get_rng_state(), state)  # nor does building change what is drawn next
    name = "blocks.0.attn.qkv.weight"
    assert torch.equal(first.context_encoder.state_dict()[name], second.context_encoder.state_dict()[name])
    assert not torch.equal(first.context_encoder.state_dict()[name], other.context_encoder.state_dict()[name])


# Records of checkpoints

SETTINGS = small_config(
    loss="l2",
    predictor_depth=None,
    masks=MaskConfig(mode="budget", min_keep=3),
    savings=Savings(target_last_block=False),
)


def old_layout(config: Config) -> dict[str, Any]:
    """The record of these settings as versions before `objective.name` wrote it."""
    record = asdict(config)
    objective = record["objective"]
    del objective["name"]
    record["masks"] = objective.pop("masks")
    for key in ("predictor_embed_dim", "predictor_depth"):
        record["model"][key] = objective.pop(key)
    return record


def test_a_record_of_this_version_is_read() -> None:
    assert registry.config_from_record(asdict(SETTINGS)) == SETTINGS
    resolved = SETTINGS.resolved()
    assert registry.config_from_record(asdict(resolved)) == resolved


def test_a_record_of_an_earlier_version_is_read_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    record = old_layout(SETTINGS)
    assert record["model"]["mlp_ratio"] is None  # what stood for the named model's value was null
    assert record["model"]["predictor_depth"] is None
    with caplog.at_level(logging.WARNING):
        assert registry.config_from_record(record) == SETTINGS
    assert caplog.messages == [
        "the checkpoint: read by the names that settings have today: "
        "masks is now objective.masks, model.predictor_depth is now objective.predictor_depth, "
        "model.predictor_embed_dim is now objective.predictor_embed_dim"
    ]


def test_a_record_with_an_unknown_key_is_refused() -> None:
    record = asdict(SETTINGS)
    record["model"]["num_registers"] = 4
    with pytest.raises(ConfigError, match=r"^the checkpoint, line \d+: unknown key model\.num_registers; "):
        registry.config_from_record(record)
