"""The least traffic of a ZeRO stage beside what DeepSpeed sends. (test_costs.py compares measured bytes with formulas.)"""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.proofs.bytes import least_traffic, small_run, theory
from fastjepa.plan.zero import bytes_sent
from tests.support.small import small_config


@pytest.mark.parametrize("stage", [1, 2])
def test_stages_1_and_2_send_twice_the_gradients_that_they_need_to(stage: Any) -> None:
    """DeepSpeed all-reduces or reduces where a reduce-scatter would do."""
    config = small_config()
    sent, least = (f(config, stage, 8, 2) for f in (bytes_sent, least_traffic))
    assert sent.gradients == 2 * least.gradients
    assert sent.weights == pytest.approx(least.weights, rel=0.01)


def test_the_column_theory_has_the_least_traffic_in_whole_bytes() -> None:
    config = small_run("bf16", accum=2, world=4)
    least = least_traffic(config, 3, 4, 2)
    assert theory(3, config, 4) == {
        "sent: gradients": round(least.gradients),
        "sent: weights": round(least.weights),
    }
