"""The verdict, from made-up figures."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fastjepa.config import Config, ModelConfig
from fastjepa.doctor.limits import Link, Rate, find_limit, format_bytes, format_rate
from fastjepa.doctor.suggest import suggest
from fastjepa.host import GIB
from fastjepa.objectives.ijepa.settings import IJEPAConfig
from tests.doctor.example_run import example_run


def test_a_healthy_run_is_limited_by_its_step_and_gets_no_suggestions() -> None:
    verdict = find_limit(example_run())
    assert verdict.limit == "step"
    assert verdict.images_per_second == 480
    assert "480 images/s" in verdict.sentence
    assert "the loader delivers 1,000" in verdict.sentence
    assert suggest(example_run()) == []


def test_the_loaders_of_all_ranks_share_the_cores_of_the_machine() -> None:
    """Alone, the 4 threads of a rank deliver 600 images/s. With two cores for each of eight ranks, they do not."""
    run = example_run(ranks=8, cores=2.0, loader={4: Rate(600.0, 0.01)}, link=Link(300e9, 1e-6))
    assert run.loader_rate == 8 * 2.0 / 0.01
    assert find_limit(run).limit == "loader"
    assert find_limit(run).sentence.endswith("(8 ranks together)")


def test_on_a_cpu_loader_and_step_share_the_cores() -> None:
    run = example_run(
        gpu=False, bf16=False, bf16_is_fast=False, cores=2.0, memory=20.0 * GIB,
        loader={1: Rate(120.0, 0.008), 4: Rate(200.0, 0.01)}, step={64: Rate(100.0, 0.02)},
    )  # fmt: skip
    verdict = find_limit(run)
    assert verdict.limit == "cores"
    assert verdict.images_per_second == pytest.approx(2 / 0.03)
    (fewer_threads,) = suggest(run)
    assert fewer_threads.argument == "data.num_threads=1"  # delivers enough, with less CPU time per image


def test_a_cpu_needs_memory_for_a_slice_of_the_micro_batch_only() -> None:
    config = Config(model=ModelConfig(name="vit_base"), objective=IJEPAConfig(), global_batch_size=2048)
    run = example_run(config=config, gpu=False, bf16=False, memory=8.0 * GIB, step={}, loader={})
    assert find_limit(run).limit is None
    assert suggest(run) == []
    assert find_limit(replace(run, stage=2)).limit == "memory"  # DeepSpeed's engine does not slice a micro batch


def test_without_a_measurement_the_limit_is_unknown() -> None:
    verdict = find_limit(example_run(loader={}))
    assert verdict.limit is None
    assert verdict.sentence == "unknown: the loader could not be measured"


def test_a_step_too_slow_to_be_measured_is_estimated() -> None:
    run = example_run(step={}, estimated_step=2.5)
    assert find_limit(run).images_per_second == 2.5
    assert "trains 2.5 images/s (estimated from its FLOPs)" in find_limit(run).sentence


def test_figures_are_written_in_short() -> None:
    assert [format_rate(rate) for rate in (1234.5, 99.96, 0.0123)] == ["1,234", "100", "0.0123"]
    assert [format_bytes(size) for size in (GIB, GIB // 2, 2**20)] == ["1.0 GiB", "0.5 GiB", "1.0 MiB"]
