"""From made-up figures to the verdict, to what is suggested, and to settings that a run can be started with."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastjepa.config import Config, DataConfig, MaskConfig, ModelConfig, ObjectiveConfig, Savings
from fastjepa.config.file import dump_config, load_config
from fastjepa.doctor.limits import GIB, Link, Rate, Run, judge
from fastjepa.doctor.suggest import Suggestion, applied, as_yaml, command, shares, suggest, what_to_do
from fastjepa.train import parse_args, resolve_config


def a_run(**changes: Any) -> Run:
    """On a GPU whose loader keeps up: 4 threads deliver 1,000 images/s, the step takes 480."""
    config = Config(model=ModelConfig(name="vit_small"), global_batch_size=256, micro_batch_size=64)
    run = Run(
        config=config, stage="torch", ranks=1, gpu=True, bf16=True, bf16_is_fast=True, cores=16.0, memory=70.0 * GIB,
        loader={4: Rate(1000.0, 0.004), 8: Rate(1900.0, 0.004)}, step={64: Rate(480.0, 0.001)},
    )  # fmt: skip
    return replace(run, **changes)


def arguments(suggestions: list[Suggestion]) -> list[str]:
    return [suggestion.argument for suggestion in suggestions]


def test_a_healthy_run_is_limited_by_its_step_and_nothing_is_suggested() -> None:
    verdict = judge(a_run())
    assert verdict.limit == "step"
    assert verdict.images_per_second == 480
    assert "480 images/s" in verdict.sentence
    assert "the loader delivers 1,000" in verdict.sentence
    assert suggest(a_run()) == []


def test_a_slow_loader_is_told_with_the_threads_that_keep_up_and_the_gain() -> None:
    run = a_run(loader={4: Rate(310.0, 0.013), 8: Rate(600.0, 0.013), 16: Rate(900.0, 0.013)})
    verdict, suggestions = judge(run), suggest(run)
    assert verdict.limit == "loader"
    assert "delivers 310 images/s with data.num_threads = 4, the step takes 480" in verdict.sentence
    assert arguments(suggestions) == ["data.num_threads=8"]  # not 16: more than the step takes is of no use
    assert "480 images/s (+55%)" in what_to_do(run, verdict, suggestions)
    assert judge(applied(run, suggestions)).limit == "step"


def test_a_loader_that_no_threads_help_says_what_else_would() -> None:
    run = a_run(loader={4: Rate(310.0, 0.013), 8: Rate(312.0, 0.026)})
    assert suggest(run) == []
    assert "a faster disk" in what_to_do(run, judge(run), [])
    config = replace(run.config, data=DataConfig(loader="turbo", dct_scaling=False))
    slow = replace(run, unused_decoder=True, config=config)
    assert arguments(suggest(slow)) == ["data.dct_scaling=true", "data.loader=auto"]


def test_ranks_of_a_machine_share_its_cores_among_their_loaders() -> None:
    """Alone a rank's 4 threads deliver 600 images/s; eight ranks with two cores each do not get there."""
    run = a_run(ranks=8, cores=2.0, loader={4: Rate(600.0, 0.01)}, link=Link(300e9, 1e-6))
    assert run.loaded == 8 * 2.0 / 0.01
    assert judge(run).limit == "loader"


def test_on_a_cpu_loader_and_step_share_the_cores() -> None:
    run = a_run(
        gpu=False, bf16=False, bf16_is_fast=False, cores=2.0, memory=20.0 * GIB,
        loader={1: Rate(120.0, 0.008), 4: Rate(200.0, 0.01)}, step={64: Rate(100.0, 0.02)},
    )  # fmt: skip
    verdict = judge(run)
    assert verdict.limit == "cores"
    assert verdict.images_per_second == pytest.approx(2 / 0.03)
    assert arguments(suggest(run)) == ["data.num_threads=1"]  # which delivers enough, for less


def test_a_slow_link_is_told_and_the_stage_that_hides_more_of_it() -> None:
    run = a_run(ranks=4, link=Link(0.1e9, 1e-4), loader={4: Rate(4000.0, 0.001)})
    verdict = judge(run)
    assert verdict.limit == "communication"
    assert "of a step wait for it" in verdict.sentence
    assert any(argument.startswith("--ds_config configs/zero") for argument in arguments(suggest(run)))
    fast = replace(run, link=Link(300e9, 1e-6))
    assert judge(fast).limit == "step"
    assert suggest(fast) == []


@pytest.mark.parametrize(
    ("memory", "ranks", "expected"),
    [
        pytest.param(6.0, 1, ["micro_batch_size"], id="more accumulation comes first: it costs nothing"),
        pytest.param(1.0, 1, [], id="nothing fits"),
        pytest.param(1.5, 8, ["--ds_config", "micro_batch_size"], id="sharded"),
    ],
)
def test_what_does_not_fit_is_made_to_fit_or_said_not_to(memory: float, ranks: int, expected: list[str]) -> None:
    config = Config(model=ModelConfig(name="vit_base"), global_batch_size=256)
    run = a_run(config=config, memory=memory * GIB, ranks=ranks, step={}, loader={})
    verdict, suggestions = judge(run), suggest(run)
    assert verdict.limit == "memory"
    assert [suggestion.key for suggestion in suggestions] == expected
    if expected:
        after = applied(run, suggestions)
        assert after.memory_needed() <= after.memory
        assert "it fits" in what_to_do(run, verdict, suggestions)
    else:
        assert "a smaller model" in what_to_do(run, verdict, suggestions)


def test_a_cpu_needs_memory_for_a_slice_of_the_micro_batch_only() -> None:
    config = Config(model=ModelConfig(name="vit_base"), global_batch_size=2048)
    run = a_run(config=config, gpu=False, bf16=False, memory=8.0 * GIB, step={}, loader={})
    assert judge(run).limit is None
    assert suggest(run) == []
    assert judge(replace(run, stage=2)).limit == "memory"  # DeepSpeed's engine takes it whole


def test_work_for_nothing_is_named_with_its_share() -> None:
    run = a_run()
    config = replace(
        run.config,
        precision="fp32",
        model=replace(run.config.model, activation_checkpointing=True),
        objective=ObjectiveConfig(savings=Savings(target_last_block=False)),
    )
    suggestions = {s.argument: s.reason for s in suggest(replace(run, config=config, bf16=False))}
    assert list(suggestions) == [
        "precision=auto",
        "objective.savings.target_last_block=true",
        "model.activation_checkpointing=false",
    ]
    assert "less arithmetic" in suggestions["objective.savings.target_last_block=true"]


def test_nothing_is_suggested_that_another_setting_forbids() -> None:
    """CUDA graphs need plain PyTorch and one of the savings off; compiled blocks cannot be sharded by ZeRO 3."""
    config = replace(
        a_run().config,
        compile="cuda_graphs",
        masks=MaskConfig(mode="budget"),
        objective=ObjectiveConfig(savings=Savings(target_last_block=False, predictor_last_block=False)),
    )
    run = a_run(config=config, ranks=4, link=Link(0.1e9, 1e-4), loader={4: Rate(4000.0, 0.001)})
    assert arguments(suggest(run)) == ["objective.savings.predictor_last_block=true"]
    tight = a_run(config=replace(Config(), compile="blocks"), ranks=8, memory=0.8 * GIB, step={}, loader={})
    assert "--ds_config configs/zero3.json" not in arguments(suggest(tight))
    assert "--ds_config configs/zero3.json" in arguments(suggest(replace(tight, config=Config())))


def test_bf16_without_instructions_for_it_is_advised_against() -> None:
    run = a_run(config=replace(a_run().config, precision="bf16"), gpu=False, bf16_is_fast=False)
    assert arguments(suggest(run)) == ["precision=auto"]
    assert not applied(run, suggest(run)).bf16


def test_a_larger_micro_batch_is_suggested_if_it_was_measured_to_be_faster() -> None:
    rates = {64: Rate(480.0, 0.001), 128: Rate(520.0, 0.001), 256: Rate(700.0, 0.001)}
    assert arguments(suggest(a_run(step=rates))) == ["micro_batch_size=256"]
    assert suggest(a_run(step=rates | {128: Rate(485.0, 0.001), 256: Rate(485.0, 0.001)})) == []


def test_batches_that_cannot_be_shared_out_are_brought_to_a_size_that_can() -> None:
    run = a_run(ranks=3, config=replace(a_run().config, micro_batch_size=50))
    suggestions = shares(run)
    assert arguments(suggestions) == ["global_batch_size=255", "micro_batch_size=17"]
    assert applied(run, suggestions).sizes.micro == 17
    assert shares(a_run()) == []


EVERY_KIND = [
    Suggestion("micro_batch_size", 8, ""),
    Suggestion("precision", "auto", ""),
    Suggestion("data.num_threads", 6, ""),
    Suggestion("data.loader", "auto", ""),
    Suggestion("objective.savings.target_last_block", True, ""),
    Suggestion("model.activation_checkpointing", False, ""),
    Suggestion("--ds_config", "configs/zero2.json", ""),
]


def test_printed_settings_are_read_as_what_was_suggested(tmp_path: Path) -> None:
    """The command, and the lines for the YAML file: both give the configuration that was judged."""
    file, lines = tmp_path / "a run.yaml", tmp_path / "lines.yaml"
    before = replace(
        a_run().config, data=DataConfig(source="/photos of '{2024..2025}'/*.tar", loader="turbo"), precision="fp32"
    )
    file.write_text(dump_config(before))
    wanted = applied(a_run(config=before), EVERY_KIND)
    assert wanted.config != before
    assert wanted.stage == 2

    words = shlex.split(command(a_run(), str(file), ["data.num_threads=1", "optim.lr=3e-4"], None, EVERY_KIND))
    assert words[:3] == ["deepspeed", "--num_gpus", "1"]
    args = parse_args(words[4:])
    assert args.ds_config == "configs/zero2.json"
    assert resolve_config(args) == replace(wanted.config, optim=replace(wanted.config.optim, lr=3e-4))

    lines.write_text(as_yaml(EVERY_KIND))
    assert load_config(lines) == applied(a_run(config=Config()), EVERY_KIND).config


@pytest.mark.parametrize(
    ("ranks", "gpu", "ds_config", "start"),
    [
        (1, True, None, "python fastjepa/train.py"),
        (4, True, None, "torchrun --nproc_per_node 4 fastjepa/train.py"),
        (4, True, "z.json", "deepspeed --num_gpus 4 fastjepa/train.py --ds_config z.json"),
        (2, False, "z.json", "deepspeed --num_accelerators 2 fastjepa/train.py --ds_config z.json"),
    ],
)
def test_the_command_starts_as_many_ranks_as_were_asked_for(
    ranks: int, gpu: bool, ds_config: str | None, start: str
) -> None:
    assert command(a_run(ranks=ranks, gpu=gpu), None, [], ds_config, []) == start
