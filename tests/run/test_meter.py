"""The meter: means and rates of a line of metrics, with whatever signals and counts an objective names."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch

from fastjepa import distributed
from fastjepa.run.meter import Meter, peak_memory
from tests.support.read_backs import ReadBacks


class Clock:
    seconds = 90.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("fastjepa.run.meter.time.perf_counter", lambda: clock.seconds)
    return clock


def update(meter: Meter, loss: float, signals: Mapping[str, float] | None = None) -> None:
    """Add a micro batch of four images with 30 tokens."""
    tensors = {name: torch.tensor(value) for name, value in (signals or {}).items()}
    meter.update(torch.tensor(loss), tensors, images=4, counts={"tokens": 30})


def test_a_line_has_means_and_rates_since_the_one_before(clock: Clock) -> None:
    meter = Meter(torch.device("cpu"))
    counts = {"context_tokens": 1000, "target_tokens": 1000}
    meter.update(torch.tensor(9.0), {}, images=1000, counts=counts)
    clock.seconds = 100.0
    meter.summary()
    meter.update(torch.tensor(0.5), {}, images=4, counts={"context_tokens": 30, "target_tokens": 50})
    meter.update(torch.tensor(0.25), {}, images=4, counts={"context_tokens": 50, "target_tokens": 30})
    meter.update_data(0.25, {"read": 0.1, "decode": 0.2, "to_device": 0.0, "prepare": 0.01})
    meter.update_data(0.75, {"read": 0.3, "decode": 0.4, "to_device": 0.02, "prepare": 0.03})
    clock.seconds = 104.0
    summary = {key: round(value, 9) for key, value in meter.summary().items() if value is not None}
    assert 0 < summary.pop("memory_gib") < 1024
    expected = {
        "loss": 0.375,
        "images_per_second": 2.0,
        "tokens_per_second": 40.0,
        "data_wait": 0.25,
        "read_ms": 200.0,
        "decode_ms": 300.0,
        "to_device_ms": 10.0,
        "prepare_ms": 20.0,
        "context_tokens": 10.0,
        "target_tokens": 10.0,
    }
    assert list(summary.items()) == list(expected.items())


def test_time_that_went_into_a_checkpoint_is_in_no_rate(clock: Clock) -> None:
    meter = Meter(torch.device("cpu"))
    clock.seconds = 100.0
    meter.restart_clock()
    update(meter, 1.0)
    clock.seconds = 102.0
    assert meter.summary()["images_per_second"] == 2.0


def test_signals_are_means_under_their_names(clock: Clock) -> None:
    meter = Meter(torch.device("cpu"))
    update(meter, 1.0, {"spread": 2.0, "rank": 10.0})
    update(meter, 3.0, {"spread": 3.0, "rank": 20.0})
    clock.seconds = 100.0
    line = meter.summary()
    assert (line["loss"], line["spread"], line["rank"]) == (2.0, 2.5, 15.0)
    update(meter, 5.0, {"spread": 7.0, "rank": 30.0})
    clock.seconds = 110.0
    line = meter.summary()
    assert (line["loss"], line["spread"], line["rank"]) == (5.0, 7.0, 30.0)


def test_a_value_that_is_not_finite_is_left_out_of_its_own_mean_alone(clock: Clock) -> None:
    meter = Meter(torch.device("cpu"))
    update(meter, math.nan, {"spread": 2.0, "rank": math.inf})
    update(meter, 3.0, {"spread": 4.0, "rank": -math.inf})
    clock.seconds = 100.0
    line = meter.summary()
    assert (line["loss"], line["spread"], line["rank"]) == (3.0, 3.0, None)  # JSON has no infinity


def test_signals_keep_their_precision_beside_a_loss_in_bf16(clock: Clock) -> None:
    meter = Meter(torch.device("cpu"))
    signals = {"exact": torch.tensor(1 + 2**-20)}
    meter.update(torch.tensor(1.5, dtype=torch.bfloat16), signals, images=1, counts={})
    clock.seconds = 100.0
    line = meter.summary()
    assert (line["loss"], line["exact"]) == (1.5, 1 + 2**-20)


def test_figures_are_those_of_all_ranks(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 is another meter, whose sums are added to those of this one."""
    meter, other = Meter(torch.device("cpu")), Meter(torch.device("cpu"))
    update(meter, 1.0, {"spread": 2.0})
    meter.update_data(1.0, {"read": 0.5})
    update(other, 2.0, {"spread": 4.0})
    update(other, 6.0, {"spread": math.nan})
    other.update_data(3.0, {"read": 0.25})
    clock.seconds = 98.0
    sums: list[torch.Tensor] = []

    def keep(values: torch.Tensor) -> list[float]:
        sums.append(values)
        return values.tolist()

    monkeypatch.setattr(distributed, "sum_over_ranks", keep)
    other.summary()
    monkeypatch.setattr(distributed, "sum_over_ranks", lambda values: (values + sums[0]).tolist())
    line = meter.summary()
    line.pop("memory_gib")
    assert line == {
        "loss": 3.0,
        "images_per_second": 1.5,
        "tokens_per_second": 11.25,
        "data_wait": 0.25,
        "read_ms": 250.0,
        "tokens": 7.5,
        "spread": 3.0,
    }


def test_signals_must_be_the_same_up_to_the_end_of_a_line(clock: Clock) -> None:
    meter = Meter(torch.device("cpu"))
    update(meter, 1.0, {"spread": 2.0})
    with pytest.raises(AssertionError, match=r"signals \('rank',\): expected \('spread',\) up to the end of the line"):
        update(meter, 1.0, {"rank": 2.0})
    clock.seconds = 100.0
    meter.summary()
    update(meter, 1.0, {"rank": 2.0})
    clock.seconds = 110.0
    assert meter.summary()["rank"] == 2.0


@pytest.mark.parametrize("name", ["loss", "tokens", "memory_gib"])
def test_a_signal_cannot_take_the_name_of_another_figure(name: str, clock: Clock) -> None:
    meter = Meter(torch.device("cpu"))
    update(meter, 1.0, {name: 2.0})
    clock.seconds = 100.0
    with pytest.raises(ValueError, match=f"have the same name: {name}"):
        meter.summary()


def test_nothing_is_read_back_before_a_line_is_due() -> None:
    meter = Meter(torch.device("cpu"))
    loss, signals = torch.tensor(1.0), {"spread": torch.tensor(2.0)}
    with ReadBacks() as read_backs:
        for _ in range(3):
            meter.update(loss, signals, images=4, counts={"tokens": 30})
        assert not read_backs.by_file
        meter.summary()
        assert read_backs.by_file


def test_the_peak_memory_of_a_process_is_in_bytes() -> None:
    assert 2**24 < peak_memory(torch.device("cpu")) < 2**40
