"""Profiles of real steps of a small model agree with the formulas, and change nothing that is learnt."""

from __future__ import annotations

import copy
import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastjepa.config import Config
from fastjepa.config.batch_sizes import BatchSizes
from fastjepa.engine.base import Engine
from fastjepa.objectives.base import Output, Prepared
from fastjepa.objectives.registry import method_of
from fastjepa.plan import zero
from fastjepa.profiling import StepProfile, Steps, SyntheticBatch, profile_steps, synthetic_batches
from fastjepa.profiling.timing import datasheet_teraflops
from tests.support.small import build_ijepa, engine_of, small_config

STEPS = Steps(warmup=1, timed=3, traced=2)
CPU = torch.device("cpu")
CONFIG = small_config(global_batch_size=8, micro_batch_size=4)
METHOD = method_of(CONFIG)
SIZES = BatchSizes.share(CONFIG, 1)


def profiled(folder: Path, config: Config = CONFIG) -> tuple[StepProfile, Engine]:
    """The profile of a new engine, and the engine, which was trained by it."""
    engine, method = engine_of(config, SIZES, CPU), method_of(config)
    batches = synthetic_batches(method, SIZES, CPU, STEPS.total)
    return profile_steps(engine, method, SIZES, batches, folder, STEPS), engine


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> StepProfile:
    return profiled(tmp_path_factory.mktemp("profile"))[0]


def test_rates_are_those_of_the_timed_steps(profile: StepProfile) -> None:
    assert len(profile.steps_ms) == STEPS.timed
    assert profile.step_ms.p50 == sorted(profile.steps_ms)[1]
    assert profile.images_per_second == pytest.approx(8e3 / profile.step_ms.p50)
    assert profile.step_ms.p20 <= profile.step_ms.p50 <= profile.step_ms.p80
    assert 0 <= profile.data_wait < 0.5


def test_the_wait_for_batches_that_come_late_is_measured(tmp_path: Path) -> None:
    def late() -> Iterator[SyntheticBatch]:
        for batch in synthetic_batches(METHOD, SIZES, CPU, STEPS.total):
            time.sleep(0.05)
            yield batch

    found = profile_steps(engine_of(CONFIG, SIZES, CPU), METHOD, SIZES, late(), tmp_path, STEPS)
    waited = found.data_wait * sum(found.steps_ms)
    assert 50 * STEPS.timed * SIZES.accum <= waited <= sum(found.steps_ms)


def test_arithmetic_is_that_of_the_masks_of_the_timed_steps(profile: StepProfile) -> None:
    batches = synthetic_batches(METHOD, SIZES, CPU, STEPS.total)
    first, last = STEPS.warmup * SIZES.accum, (STEPS.warmup + STEPS.timed) * SIZES.accum
    tokens = [batch.prepared.lengths().tokens() for batch in batches[first:last]]
    flops = sum(SIZES.micro * METHOD.step_flops(each) for each in tokens)
    assert 1e12 * profile.teraflop_per_step == pytest.approx(flops / STEPS.timed)
    kinds = [each._asdict() for each in tokens]
    means = {name: sum(kind[name] for kind in kinds) / len(kinds) for name in kinds[0]}
    assert profile.tokens == pytest.approx(means)
    counted = [sum(batch.prepared.counts.values()) for batch in batches[first:last]]
    rates = sorted(1e3 * sum(counted[2 * i : 2 * i + 2]) / ms for i, ms in enumerate(profile.steps_ms))
    assert profile.tokens_per_second == pytest.approx(rates[1])
    assert profile.mfu == pytest.approx(profile.teraflops / profile.ceilings.teraflops)
    rates = sorted(
        sum(SIZES.micro * METHOD.step_flops(each) for each in tokens[2 * i : 2 * i + 2]) / ms
        for i, ms in enumerate(profile.steps_ms)
    )
    assert 1e9 * profile.teraflops == pytest.approx(rates[1])


def test_the_split_adds_up_and_names_all_parts(profile: StepProfile) -> None:
    parts = {part.name: part.share for part in profile.split.parts}
    assert sum(parts.values()) == pytest.approx(1)
    trained = {"context encoder", "target encoder", "predictor", "loss", "backward", "optimizer"}
    assert {*trained, "data wait", "other"} == set(parts)
    assert all(parts[name] > 0 for name in trained)
    assert 0 < profile.split.matmul_share < 1
    assert sum(row.share for row in profile.split.operators) <= 1 + 1e-9


def test_memory_is_that_of_the_formula_for_the_state(profile: StepProfile) -> None:
    parameters = zero.parameters_of(CONFIG)
    state = zero.state_bytes(CONFIG, "torch", 1, bf16=False)
    objective = build_ijepa(CONFIG)
    buffers = sum(b.nbytes for module in (objective.context_encoder, objective.predictor) for b in module.buffers())
    slack = 6 * 64 + 64  # the groups' flat buffers are padded, and count their updates
    memory = profile.memory
    assert memory.weights == pytest.approx(4 * parameters.trained + buffers, abs=slack)
    assert memory.averages == pytest.approx(memory.weights - 4 * parameters.of_part("predictor"), abs=buffers)
    assert memory.gradients == pytest.approx(state.gradients, abs=slack)
    assert memory.moments == pytest.approx(state.moments, abs=2 * slack)
    assert memory.masters == 0
    assert memory.peak == memory.state + memory.activations + memory.other


def test_activations_are_about_those_of_the_formula(tmp_path: Path) -> None:
    """On the CPU a step keeps some copies that a GPU's kernels do without."""
    measured = profiled(tmp_path)[0]
    batches = synthetic_batches(METHOD, SIZES, CPU, STEPS.total)
    timed = batches[STEPS.warmup * SIZES.accum : (STEPS.warmup + STEPS.timed) * SIZES.accum]
    lengths = [batch.prepared.lengths() for batch in timed]
    per_image = sum(METHOD.activation_bytes(x.tokens(), bf16=False, autocast=False) for x in lengths) / len(lengths)
    assert 0.7 < measured.memory.activations / (SIZES.micro * per_image) < 2


def test_the_trace_is_a_chrome_trace(tmp_path: Path) -> None:
    profiled(tmp_path)
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert sum(event["name"] == "traced step" for event in events) == STEPS.traced


def test_a_profile_can_be_written_as_json(profile: StepProfile) -> None:
    read = json.loads(json.dumps(profile.as_dict()))
    assert read["tokens"] == profile.tokens
    assert read["step_ms"]["p50"] == profile.step_ms.p50


def test_profiling_changes_no_weight_and_draws_no_random_number(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    _, engine = profiled(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    plain = engine_of(CONFIG, SIZES, CPU)
    plain.model.train()
    for batch in synthetic_batches(METHOD, SIZES, CPU, STEPS.total):
        plain.micro_step(batch.prepared)
    state = copy.deepcopy(plain.model.state_dict())
    assert all(torch.equal(value, state[name]) for name, value in engine.model.state_dict().items())


def test_too_few_batches_are_refused(tmp_path: Path) -> None:
    engine = engine_of(CONFIG, SIZES, CPU)
    with pytest.raises(ValueError, match="ended before"):
        profile_steps(engine, METHOD, SIZES, synthetic_batches(METHOD, SIZES, CPU, 2), tmp_path, STEPS)


def test_recomputation_is_not_counted_as_work(profile: StepProfile, tmp_path: Path) -> None:
    lean = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, activation_checkpointing=True))
    again, _ = profiled(tmp_path, lean)
    assert again.teraflop_per_step == profile.teraflop_per_step
    assert again.memory.activations < profile.memory.activations


@pytest.mark.parametrize(
    ("gpu", "dtype", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989),
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312),
        ("NVIDIA H100 PCIe", torch.bfloat16, None),  # a slower one
        ("NVIDIA H100 80GB HBM3", torch.float32, None),
    ],
)
def test_a_datasheet_is_quoted_for_bf16_on_known_gpus_only(
    gpu: str, dtype: torch.dtype, teraflops: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: gpu)
    assert datasheet_teraflops(torch.device("cuda"), dtype) == teraflops
    assert datasheet_teraflops(CPU, dtype) is None


@pytest.mark.gpu
def test_on_a_gpu_every_kernel_belongs_to_its_part_of_the_step(tmp_path: Path) -> None:
    device = torch.device("cuda")
    batches = synthetic_batches(METHOD, SIZES, device, STEPS.total)
    found = profile_steps(engine_of(CONFIG, SIZES, device), METHOD, SIZES, batches, tmp_path, STEPS)
    parts = {part.name: part.share for part in found.split.parts}
    assert sum(parts.values()) == pytest.approx(1)
    for name in ("context encoder", "target encoder", "predictor", "backward", "optimizer"):
        assert parts[name] > 0
    assert parts.get("other", 0) < 0.1
    assert any(row.kind == "matmul" for row in found.split.operators)
    assert found.memory.activations > 0
    assert len(found.steps_ms) == STEPS.timed


@pytest.mark.gpu
def test_a_gpu_that_has_work_does_not_wait_for_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host does wait: it has sent the work, and asks for the next batch."""
    device = torch.device("cuda")
    engine = engine_of(CONFIG, SIZES, device)
    micro_step = engine.micro_step

    def long_step(batch: Prepared) -> Output:
        output = micro_step(batch)
        torch.cuda._sleep(400_000_000)  # 0.2 s
        return output

    def late() -> Iterator[SyntheticBatch]:
        for batch in synthetic_batches(METHOD, SIZES, device, STEPS.total):
            time.sleep(0.05)
            yield batch

    monkeypatch.setattr(engine, "micro_step", long_step)
    assert profile_steps(engine, METHOD, SIZES, late(), tmp_path, STEPS).data_wait < 0.05
