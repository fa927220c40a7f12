"""The contract of an objective: a method from outside trains, resumes, and is profiled, planned and evaluated."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from benchmarks.launch import ROOT, launch
from fastjepa.config.batch_sizes import BatchSizes
from fastjepa.engine.base import Engine
from fastjepa.evaluate import evaluate_run, load_encoder
from fastjepa.objectives import registry
from fastjepa.objectives.base import DenseBatch, Moment, Prepared, check_objective
from fastjepa.objectives.registry import load_config, method_of, register
from fastjepa.plan.__main__ import main as plan
from fastjepa.plan.zero import parameters_of
from fastjepa.profiling import Steps, profile_steps, synthetic_batches
from fastjepa.run.folder import RunFolder
from tests.support.small import engine_of
from tests.support.toy_objective import Toy, ToyConfig, ToyObjective
from tests.workers.toy import ENGINES

RECIPE = """
global_batch_size: 8
micro_batch_size: 4
epochs: 1
log_interval: 1
checkpoint_interval: 4
precision: PRECISION
compile: none
data: {source: DATA, image_size: 16, in_channels: 1, mean: [0.5], std: [0.25], loader: turbo, num_threads: 1}
model: {patch_size: 4, embed_dim: 16, depth: 1, num_heads: 2, init: fan_in}
objective: {name: toy, hidden: 0.4}
optim: {warmup_epochs: 0.25, lr: 1e-2, ema_momentum: [0.9, 1.0]}
"""


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The toy is a method of this file's tests only."""
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    register("toy", ToyConfig, Toy)


def recipe(folder: Path, precision: str = "fp32") -> str:
    """A configuration beside 70 grey images of two classes, and as many held-out ones."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for index in range(70):
            image = folder / "images" / split / f"class{index % 2}" / f"{index:03d}.png"
            image.parent.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 128 + 127 * (index % 2), (18 + index % 5, 18 + index % 3), dtype=np.uint8)
            Image.fromarray(pixels).save(image)
    text = RECIPE.replace("DATA", str(folder / "images")).replace("PRECISION", precision)
    (folder / "run.yaml").write_text(text)
    return str(folder / "run.yaml")


@pytest.fixture(
    scope="module", params=[(1, "fp32"), (2, "fp32"), (2, "bf16")], ids=["1 rank", "2 ranks", "2 ranks bf16"]
)
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run and a resumed one by every engine."""
    world, precision = request.param
    folder = tmp_path_factory.mktemp("toy")
    launch("tests.workers.toy", world, recipe(folder, precision), str(folder), timeout=500)
    return folder


def lines(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.processes
@pytest.mark.parametrize("engine", ENGINES)
def test_a_resumed_run_ends_with_the_same_bits(runs: Path, engine: str) -> None:
    whole, resumed = (runs / engine / run / "checkpoints" / "step_00000008" for run in ("whole", "resumed"))
    files = sorted(file.name for file in whole.glob("*.safetensors"))
    assert files == sorted(file.name for file in resumed.glob("*.safetensors"))
    for file in files:
        mine, theirs = load_file(whole / file), load_file(resumed / file)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine), file


@pytest.mark.processes
@pytest.mark.parametrize("engine", ENGINES)
def test_signals_scalars_and_counts_are_in_the_metrics(runs: Path, engine: str) -> None:
    whole = lines(runs / engine / "whole")
    assert [line["step"] for line in whole] == list(range(1, 9))
    assert [line["progress"] for line in whole] == [step / 8 for step in range(8)]
    assert all(0 < line["error"] <= line["loss"] for line in whole)
    assert all(line["patch_tokens"] == 16 for line in whole)
    resumed = lines(runs / engine / "resumed")
    assert [line["loss"] for line in resumed] == [line["loss"] for line in whole[4:]]


@pytest.mark.processes
@pytest.mark.parametrize("engine", ENGINES)
def test_the_trained_buffer_and_the_average_are_checkpointed(runs: Path, engine: str) -> None:
    first, last = (
        load_file(runs / engine / "whole" / "checkpoints" / step / "model.safetensors")
        for step in ("step_00000004", "step_00000008")
    )
    assert 0 < first["centre"].item() < last["centre"].item()
    assert not torch.equal(first["slow.norm.bias"], last["slow.norm.bias"])
    assert not torch.equal(last["slow.norm.bias"], last["encoder.norm.bias"])


def test_it_is_profiled(tmp_path: Path) -> None:
    config = load_config(recipe(tmp_path))
    method, sizes, steps = method_of(config), BatchSizes(4, 2), Steps(warmup=1, timed=2, traced=1)
    engine = engine_of(config, sizes, torch.device("cpu"))
    batches = synthetic_batches(method, sizes, torch.device("cpu"), steps.total)
    profile = profile_steps(engine, method, sizes, batches, tmp_path, steps)
    assert profile.tokens == {"patch": 16}
    assert profile.memory.averages > 0
    assert profile.teraflop_per_step == pytest.approx(8 * method.step_flops(method.typical_tokens()[0]) / 1e12)


def test_it_is_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(tmp_path)
    assert plan(["--config", path, "--gpus", "2"]) == 0
    assert "encoder 0 M, head 0 M, slow 0 M parameters; objective toy" in capsys.readouterr().out
    assert list(parameters_of(load_config(path)).parts) == ["encoder", "head", "slow"]


@pytest.mark.processes
def test_it_is_evaluated(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = runs / "torch" / "whole"
    assert load_encoder(run)(torch.zeros(2, 1, 16, 16)).shape == (2, 16, 16)
    report = evaluate_run(RunFolder(run), torch.device("cpu"))
    assert report is not None
    assert "learned" in capsys.readouterr().out


def test_it_is_short() -> None:
    code = (ROOT / "tests" / "support" / "toy_objective.py").read_text().splitlines()
    assert sum(bool(line.strip()) for line in code) <= 60


# What breaks the contract is refused when the networks are built


def _objective(tmp_path: Path, change: Callable[[ToyObjective], None]) -> None:
    objective = ToyObjective(load_config(recipe(tmp_path)))
    change(objective)
    check_objective(objective, "slow")


def test_the_toy_keeps_the_contract(tmp_path: Path) -> None:
    _objective(tmp_path, lambda objective: None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda o: o.head.bias.requires_grad_(False), r"head\.bias needs no gradient"),
        (lambda o: setattr(o, "extra", nn.Linear(2, 2)), r"extra\.weight is in 0 parts: expected one"),
        (lambda o: setattr(o.head, "again", o.encoder.norm), r"encoder\.norm\.weight is in 2 parts: expected one"),
        (
            lambda o: setattr(o.slow, "more", nn.Linear(2, 2)),
            "part slow: expected encoder before it, with parameters of",
        ),
        (lambda o: setattr(o, "slow", nn.Linear(2, 2)), "part slow: expected encoder before it, with parameters of"),
        (lambda o: setattr(o, "centre", torch.zeros(1, dtype=torch.float64)), "state buffer centre: .* in fp32"),
        (
            lambda o: o.register_buffer("count", torch.zeros(1, dtype=torch.int64)),
            "buffer count is torch.int64: expected",
        ),
    ],
)
def test_an_objective_that_breaks_the_contract_is_refused(
    change: Callable[[ToyObjective], None], message: str, tmp_path: Path
) -> None:
    with pytest.raises(TypeError, match=message):
        _objective(tmp_path, change)


def test_a_part_that_is_evaluated_must_exist(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="evaluated part teacher: expected one of encoder, head, slow"):
        check_objective(ToyObjective(load_config(recipe(tmp_path))), "teacher")


# State buffers


def toy_engine(tmp_path: Path, accum: int = 1) -> tuple[Engine, Prepared]:
    config = load_config(recipe(tmp_path))
    engine = engine_of(config, BatchSizes(4, accum), torch.device("cpu"))
    images = torch.arange(4 * 256, dtype=torch.float32).view(4, 1, 16, 16).remainder(251)
    return engine, method_of(config).prepare([images.byte()], torch.arange(4), Moment(0, 1, 8))


def test_statistics_are_means_over_the_micro_batches_of_a_step(tmp_path: Path) -> None:
    engine, batch = toy_engine(tmp_path, accum=2)
    images, masked = batch.tensors()
    other = DenseBatch((images // 2, masked), batch.lengths().tokens())
    engine.micro_step(batch)
    assert engine.model.state()["centre"].item() == 0
    engine.micro_step(other)
    brightness = (images.float().mean() + (images // 2).float().mean()) / 2 / 255
    torch.testing.assert_close(engine.model.state()["centre"], 0.1 * brightness[None])


def test_a_skipped_step_does_not_touch_state_buffers(tmp_path: Path) -> None:
    engine, batch = toy_engine(tmp_path)
    engine.micro_step(batch)
    before = engine.model.state()["centre"].clone()
    images, masked = batch.tensors()
    engine.micro_step(DenseBatch((images * torch.nan, masked), batch.lengths().tokens()))
    assert int(engine.skipped_in_a_row()) == 1
    assert torch.equal(engine.model.state()["centre"], before)


def test_a_buffer_that_changes_and_is_not_in_the_state_is_refused_when_saved(tmp_path: Path) -> None:
    engine, batch = toy_engine(tmp_path)
    engine.micro_step(batch)
    assert "encoder.pos_embed" in engine.constants()
    engine.model.get_buffer("encoder.pos_embed").add_(1)
    with pytest.raises(TypeError, match=r"buffer encoder\.pos_embed has changed in training"):
        engine.constants()
