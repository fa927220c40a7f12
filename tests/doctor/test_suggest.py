"""From made-up figures to suggestions, and to settings that a run can be started with."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from fastjepa.config import Config, DataConfig, ModelConfig
from fastjepa.config.file import dump_config
from fastjepa.doctor.limits import Link, Rate, find_limit
from fastjepa.doctor.suggest import (
    Suggestion,
    applied,
    as_yaml,
    fix_batch_sizes,
    start_command,
    suggest,
    what_to_do,
)
from fastjepa.host import GIB
from fastjepa.objectives.ijepa.block_sizes import MaskConfig
from fastjepa.objectives.ijepa.settings import IJEPAConfig, Savings
from fastjepa.objectives.registry import load_config
from fastjepa.train import parse_args, resolve_config
from tests.doctor.example_run import example_run


def arguments(suggestions: list[Suggestion]) -> list[str]:
    return [suggestion.argument for suggestion in suggestions]


def test_a_slow_loader_gets_as_many_threads_as_keep_up_with_the_step() -> None:
    run = example_run(loader={4: Rate(310.0, 0.013), 8: Rate(600.0, 0.013), 16: Rate(900.0, 0.013)})
    verdict, suggestions = find_limit(run), suggest(run)
    assert verdict.limit == "loader"
    assert "delivers 310 images/s with data.num_threads = 4, the step trains 480" in verdict.sentence
    assert arguments(suggestions) == ["data.num_threads=8"]  # not 16: the step cannot use more
    assert "480 images/s (+55%)" in what_to_do(run, verdict, suggestions)
    assert find_limit(applied(run, suggestions)).limit == "step"


def test_a_loader_that_more_threads_do_not_help_gets_other_advice() -> None:
    run = example_run(loader={4: Rate(310.0, 0.013), 8: Rate(312.0, 0.026)})
    assert suggest(run) == []
    assert "a faster disk" in what_to_do(run, find_limit(run), [])
    config = replace(run.config, data=DataConfig(loader="turbo", dct_scaling=False))
    slow = replace(run, dali_works=True, config=config)
    assert arguments(suggest(slow)) == ["data.dct_scaling=true", "data.loader=auto"]
    already = replace(slow, config=replace(run.config, data=DataConfig(loader="auto")))
    assert suggest(already) == []


def test_a_slow_link_gets_the_zero_stage_that_hides_more_of_it() -> None:
    run = example_run(ranks=4, link=Link(0.1e9, 1e-4), loader={4: Rate(4000.0, 0.001)})
    verdict = find_limit(run)
    assert verdict.limit == "communication"
    assert "of its time waiting for it" in verdict.sentence
    assert any(argument.startswith("--ds_config configs/zero") for argument in arguments(suggest(run)))
    fast = replace(run, link=Link(300e9, 1e-6))
    assert find_limit(fast).limit == "step"
    assert suggest(fast) == []


@pytest.mark.parametrize(
    ("memory", "ranks", "expected"),
    [
        pytest.param(6.0, 1, ["micro_batch_size"], id="more accumulation comes first: it costs nothing"),
        pytest.param(1.0, 1, [], id="nothing fits"),
        pytest.param(1.5, 8, ["--ds_config", "micro_batch_size"], id="sharded"),
    ],
)
def test_a_run_that_does_not_fit_gets_settings_with_which_it_does_if_there_are_any(
    memory: float, ranks: int, expected: list[str]
) -> None:
    config = Config(model=ModelConfig(name="vit_base"), objective=IJEPAConfig(), global_batch_size=256)
    run = example_run(config=config, memory=memory * GIB, ranks=ranks, step={}, loader={})
    verdict, suggestions = find_limit(run), suggest(run)
    assert verdict.limit == "memory"
    assert [suggestion.key for suggestion in suggestions] == expected
    if expected:
        after = applied(run, suggestions)
        assert after.memory_needed() <= after.memory
        assert "it fits" in what_to_do(run, verdict, suggestions)
    else:
        assert "a smaller model" in what_to_do(run, verdict, suggestions)


def test_needless_arithmetic_is_named_with_its_share() -> None:
    run = example_run()
    config = replace(
        run.config,
        precision="fp32",
        model=replace(run.config.model, activation_checkpointing=True),
        objective=IJEPAConfig(savings=Savings(target_last_block=False)),
    )
    suggestions = {s.argument: s.reason for s in suggest(replace(run, config=config, bf16=False))}
    assert list(suggestions) == [
        "precision=auto",
        "objective.savings.target_last_block=true",
        "model.activation_checkpointing=false",
    ]
    assert "less arithmetic" in suggestions["objective.savings.target_last_block=true"]


def test_a_setting_that_another_forbids_is_not_suggested() -> None:
    """CUDA graphs need plain PyTorch and one of the savings off; compiled blocks cannot be sharded by ZeRO 3."""
    config = replace(
        example_run().config,
        compile="cuda_graphs",
        objective=IJEPAConfig(
            masks=MaskConfig(mode="budget"), savings=Savings(target_last_block=False, predictor_last_block=False)
        ),
    )
    run = example_run(config=config, ranks=4, link=Link(0.1e9, 1e-4), loader={4: Rate(4000.0, 0.001)})
    assert arguments(suggest(run)) == ["objective.savings.predictor_last_block=true"]
    config = Config(objective=IJEPAConfig(), compile="blocks")
    tight = example_run(config=config, ranks=8, memory=0.8 * GIB, step={}, loader={})
    assert "--ds_config configs/zero3.json" not in arguments(suggest(tight))
    assert "--ds_config configs/zero3.json" in arguments(
        suggest(replace(tight, config=Config(objective=IJEPAConfig())))
    )


def test_bf16_is_not_suggested_without_instructions_for_it() -> None:
    run = example_run(config=replace(example_run().config, precision="bf16"), gpu=False, bf16_is_fast=False)
    assert arguments(suggest(run)) == ["precision=auto"]
    assert not applied(run, suggest(run)).bf16


def test_a_larger_micro_batch_is_suggested_if_it_was_measured_to_be_faster() -> None:
    rates = {64: Rate(480.0, 0.001), 128: Rate(520.0, 0.001), 256: Rate(700.0, 0.001)}
    assert arguments(suggest(example_run(step=rates))) == ["micro_batch_size=256"]
    assert suggest(example_run(step=rates | {128: Rate(485.0, 0.001), 256: Rate(485.0, 0.001)})) == []


def test_batch_sizes_that_cannot_be_divided_are_replaced_by_ones_that_can() -> None:
    run = example_run(ranks=3, config=replace(example_run().config, micro_batch_size=50))
    suggestions = fix_batch_sizes(run)
    assert arguments(suggestions) == ["global_batch_size=255", "micro_batch_size=17"]
    assert applied(run, suggestions).sizes.micro == 17
    assert fix_batch_sizes(example_run()) == []


EVERY_KIND = [
    Suggestion("micro_batch_size", 8, ""),
    Suggestion("precision", "auto", ""),
    Suggestion("data.num_threads", 6, ""),
    Suggestion("data.loader", "auto", ""),
    Suggestion("objective.savings.target_last_block", True, ""),
    Suggestion("model.activation_checkpointing", False, ""),
    Suggestion("--ds_config", "configs/zero2.json", ""),
]


def test_the_printed_command_and_yaml_are_read_as_the_configuration_that_was_judged(tmp_path: Path) -> None:
    file, lines = tmp_path / "a run.yaml", tmp_path / "lines.yaml"
    before = replace(
        example_run().config,
        data=DataConfig(source="/photos of '{2024..2025}'/*.tar", loader="turbo"),
        precision="fp32",
    )
    file.write_text(dump_config(before))
    wanted = applied(example_run(config=before), EVERY_KIND)
    assert wanted.config != before
    assert wanted.stage == 2

    words = shlex.split(
        start_command(example_run(), str(file), ["data.num_threads=1", "optim.lr=3e-4"], None, EVERY_KIND)
    )
    assert words[:3] == ["deepspeed", "--num_gpus", "1"]
    args = parse_args(words[4:])
    assert args.ds_config == "configs/zero2.json"
    expected = replace(wanted.config, optim=replace(wanted.config.optim, lr=3e-4))
    assert resolve_config(args) == expected.resolved()  # the file holds the sizes of the named model

    lines.write_text(as_yaml(EVERY_KIND))
    assert load_config(lines) == applied(example_run(config=Config(objective=IJEPAConfig())), EVERY_KIND).config


@pytest.mark.parametrize(
    ("ranks", "gpu", "ds_config", "start"),
    [
        (1, True, None, "python fastjepa/train.py"),
        (4, True, None, "torchrun --nproc_per_node 4 fastjepa/train.py"),
        (4, True, "z.json", "deepspeed --num_gpus 4 fastjepa/train.py --ds_config z.json"),
        (2, False, "z.json", "deepspeed --num_accelerators 2 fastjepa/train.py --ds_config z.json"),
    ],
)
def test_the_command_starts_the_ranks_of_the_run(ranks: int, gpu: bool, ds_config: str | None, start: str) -> None:
    assert start_command(example_run(ranks=ranks, gpu=gpu), None, [], ds_config, []) == start
