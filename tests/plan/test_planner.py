"""The plan of a stage stays within what hardware and memory allow, and recommends what the documentation says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fastjepa.config import Config, ModelConfig
from fastjepa.objectives.ijepa.settings import IJEPAConfig
from fastjepa.objectives.registry import method_of
from fastjepa.plan import zero
from fastjepa.plan.datasheets import DEVICES
from fastjepa.plan.planner import Cluster, memory_formula, plan_stage, recommend
from fastjepa.plan.zero import STAGES, Stage

HUGE = Config(model=ModelConfig(name="vit_huge", patch_size=14), objective=IJEPAConfig())


def test_throughput_is_never_above_the_peak() -> None:
    method = method_of(HUGE)
    mean, _ = method.typical_tokens()
    for device in DEVICES.values():
        for gpus in (1, 8, 1024):
            cluster = Cluster(device=device, gpus=gpus)
            for stage in STAGES:
                plan = plan_stage(HUGE, cluster, stage)
                bound = gpus * device.flops * cluster.utilisation / method.step_flops(mean)
                assert 0 < plan.images_per_second <= bound


def test_more_memory_never_means_a_smaller_micro_batch() -> None:
    clusters = [Cluster(device=DEVICES["h100"], gpus=8, memory=memory) for memory in (24, 40, 80, 141)]
    for checkpointing in (False, True):
        model = replace(HUGE.model, activation_checkpointing=checkpointing)
        micro = [plan_stage(replace(HUGE, model=model), cluster, 2).micro for cluster in clusters]
        assert micro == sorted(micro)
        assert micro[-1] > 0


@pytest.mark.parametrize("stage", STAGES)
def test_the_micro_batch_is_the_largest_that_fits_beside_the_state(stage: Stage) -> None:
    cluster = Cluster(device=DEVICES["h100"], gpus=8)
    plan = plan_stage(HUGE, cluster, stage)
    state, per_image = memory_formula(HUGE, stage, 8)
    assert (plan.state, plan.activations_per_image) == (state, per_image)
    assert plan.micro == zero.largest_micro_batch(per_image, cluster.usable - state, HUGE.global_batch_size // 8)
    assert plan.micro * plan.accum * 8 == HUGE.global_batch_size
    assert state + plan.micro * per_image <= cluster.usable


@pytest.mark.parametrize(("gpus", "stage"), [(1, "torch"), (2, 1), (8, 1), (64, 1), (1024, 1)])
@pytest.mark.parametrize("model", ["vit_small", "vit_giant"])
def test_plain_pytorch_is_recommended_for_one_gpu_and_zero_1_for_several(model: Any, gpus: int, stage: Stage) -> None:
    """README and docs/plan.md say so."""
    config = Config(model=ModelConfig(name=model), objective=IJEPAConfig())
    cluster = Cluster(device=DEVICES["h100"], gpus=gpus)
    chosen = recommend([plan_stage(config, cluster, stage) for stage in STAGES])
    assert chosen is not None
    assert chosen[0].stage == stage
