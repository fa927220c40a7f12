"""Suggests settings that let a run start or make it faster, each with its reason; none that would change nothing."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import yaml

from fastjepa.doctor.limits import Run, Verdict, find_limit, format_bytes, format_rate
from fastjepa.errors import ConfigError
from fastjepa.objectives.registry import method_of
from fastjepa.plan.planner import memory_formula, recommend
from fastjepa.plan.zero import STAGES, Stage, largest_micro_batch
from fastjepa.profiling.timing import NOISE

_MIN_GAIN = 1 + NOISE
_DS_CONFIG = "--ds_config"

_Section = TypeVar("_Section")


@dataclass(frozen=True)
class Suggestion:
    key: str
    """section.key of the configuration, or --ds_config."""
    value: bool | int | str
    reason: str

    @property
    def argument(self) -> str:
        """The suggestion as it is written on the command line."""
        value = str(self.value).lower() if isinstance(self.value, bool) else self.value
        return f"{self.key} {value}" if self.key == _DS_CONFIG else f"{self.key}={value}"


def suggest(run: Run) -> list[Suggestion]:
    """Suggest settings, each for the run with those before it.

    Args:
        run: its batch sizes can be divided among ranks and micro batches (see `fix_batch_sizes`).
    """
    found: list[Suggestion] = []
    for rule in (_precision, _memory, _less_arithmetic, _larger_micro_batch, _stage, _loader):
        for suggestion in rule(run):
            found.append(suggestion)
            run = applied(run, [suggestion])
    last = {suggestion.key: suggestion for suggestion in found}  # of one key, the last counts
    return list(last.values())


def applied(run: Run, suggestions: Sequence[Suggestion]) -> Run:
    """The run with the suggestions in place of its own settings."""
    for suggestion in suggestions:
        if suggestion.key == _DS_CONFIG:
            run = dataclasses.replace(run, stage=next(s for s in STAGES if _ds_config_file(s) == suggestion.value))
        else:
            run = dataclasses.replace(
                run, config=_with_setting(run.config, suggestion.key.split("."), suggestion.value)
            )
    precision = run.config.precision
    bf16 = precision == "bf16" or (precision == "auto" and run.gpu and run.bf16_is_fast)
    return dataclasses.replace(run, bf16=bf16)


def _with_setting(section: _Section, keys: list[str], value: object) -> _Section:
    first, *rest = keys
    new: Any = _with_setting(getattr(section, first), rest, value) if rest else value
    return dataclasses.replace(section, **{first: new})  # type: ignore[type-var]


def _ds_config_file(stage: Stage) -> str:
    return f"configs/zero{stage}.json"


def as_yaml(suggestions: Sequence[Suggestion]) -> str:
    """The suggestions as lines of the configuration's file."""
    settings: dict[str, Any] = {}
    for suggestion in suggestions:
        if suggestion.key != _DS_CONFIG:
            *sections, name = suggestion.key.split(".")
            inner = settings
            for section in sections:
                inner = inner.setdefault(section, {})
            inner[name] = suggestion.value
    return yaml.safe_dump(settings, sort_keys=False) if settings else ""


def start_command(
    run: Run,
    config_file: str | None,
    overrides: Sequence[str],
    ds_config: str | None,
    suggestions: Sequence[Suggestion],
) -> str:
    """The command that starts the run with the suggestions.

    Args:
        overrides: settings of the command line; a suggestion for the same key replaces them.
        ds_config: DeepSpeed JSON, None for plain PyTorch; a suggestion for it replaces it.
    """
    settings = dict(override.partition("=")[::2] for override in overrides)
    settings |= {s.key: s.argument.partition("=")[2] for s in suggestions if s.key != _DS_CONFIG}
    suggested_file = next((str(s.value) for s in suggestions if s.key == _DS_CONFIG), None)
    file = suggested_file or ds_config
    ranks = f"--num_gpus {run.ranks}" if run.gpu else f"--num_accelerators {run.ranks}"
    if file:
        start = f"deepspeed {ranks} fastjepa/train.py {_DS_CONFIG} {shlex.quote(file)}"
    elif run.ranks > 1:
        start = f"torchrun --nproc_per_node {run.ranks} fastjepa/train.py"
    else:
        start = "python fastjepa/train.py"
    file_words = ["--config", config_file] if config_file else []
    return f"{start} {shlex.join([*file_words, *(f'{key}={value}' for key, value in settings.items())])}".strip()


def what_to_do(run: Run, verdict: Verdict, suggestions: Sequence[Suggestion]) -> str:
    """A sentence to follow the verdict: what the suggestions gain, or what else would help."""
    after = find_limit(applied(run, suggestions))
    if verdict.limit == "memory":
        if after.limit != "memory":
            known = f", and is {after.sentence}" if after.limit else ""
            return f"With the settings below it fits{known}"
        return "Use a smaller model, larger patches, smaller images or more ranks (--ranks)"
    before = verdict.images_per_second
    if before and after.images_per_second and after.images_per_second >= _MIN_GAIN * before:
        gain = after.images_per_second / before - 1
        return f"The settings below make it about {format_rate(after.images_per_second)} images/s ({gain:+.0%})"
    return {
        "loader": "No number of threads that was tried delivers more: smaller files, a faster disk or more cores would",
        "step": "This is as it should be; fastjepa/train.py --profile shows where the time of a step goes",
        "cores": "More cores or a GPU would make it faster",
        "communication": "A faster link, or more images per rank and step (global_batch_size), would make it faster",
        None: "See the problems above",
    }[verdict.limit]


def fix_batch_sizes(run: Run) -> list[Suggestion]:
    """Suggest batch sizes that ranks and micro batches divide, where those of the run cannot be divided."""
    found = []
    config, ranks = run.config, run.ranks
    total = config.global_batch_size
    if total % ranks:
        total = max(1, round(total / ranks)) * ranks
        why = f"a global batch of {config.global_batch_size} images cannot be divided among {ranks} ranks"
        found.append(Suggestion("global_batch_size", total, why))
    micro, share = config.micro_batch_size, total // ranks
    if micro is not None and share % min(micro, share):
        smaller = max(n for n in range(1, min(micro, share)) if share % n == 0)
        why = f"the {share} images of each rank cannot be divided into micro batches of {micro}"
        found.append(Suggestion("micro_batch_size", smaller, why))
    return found


# The rules


def _precision(run: Run) -> Iterator[Suggestion]:
    if run.gpu and run.bf16_is_fast and run.config.precision == "fp32":
        why = "this GPU has bf16, which needs half the memory of fp32 and runs on its matrix units"
        yield Suggestion("precision", "auto", why)
    elif not run.bf16_is_fast and run.config.precision == "bf16":
        yield Suggestion("precision", "auto", "this device has no instructions for bf16: fp32 is faster")


def _memory(run: Run) -> Iterator[Suggestion]:
    if run.memory_needed() <= run.memory:
        return
    needed = f"a micro batch of {run.sizes.micro} images needs {format_bytes(run.memory_needed())}"
    needed += f" of {format_bytes(run.memory)} available"
    share = run.config.global_batch_size // run.ranks
    lean = _with_setting(run.config, ["model", "activation_checkpointing"], True)
    stages = [run.stage, *(stage for stage in _zero_stages(run) if stage not in (0, run.stage))]
    for config in (run.config, lean):
        for stage in stages:
            state, per_image = memory_formula(config, stage, run.ranks, bf16=run.bf16)
            micro = largest_micro_batch(per_image, run.memory - state, share)
            if not micro:
                continue
            fits = format_bytes(state + micro * per_image)
            if stage != run.stage:
                why = f"{needed}; ZeRO {stage} divides the state among the ranks"
                yield Suggestion(_DS_CONFIG, _ds_config_file(stage), why)
            if config is lean:
                why = f"{needed}; activations are then computed a second time, which costs one more forward pass"
                yield Suggestion("model.activation_checkpointing", True, why)
            if micro < run.sizes.micro:
                why = f"{needed}; this one needs {fits}, and accumulates more of them: the steps stay the same"
                yield Suggestion("micro_batch_size", micro, why)
            return


def _zero_stages(run: Run) -> list[Stage]:
    """The ZeRO stages with which the run could start and from which it could gain."""
    if run.ranks == 1 or run.config.compile == "cuda_graphs":
        return []
    return [stage for stage in STAGES if stage != "torch" and (stage != 3 or run.config.compile != "blocks")]


def _less_arithmetic(run: Run) -> Iterator[Suggestion]:
    """Turn off what computes something that nothing needs."""
    method = method_of(run.config)
    mean, _ = method.typical_tokens()
    now = method.step_flops(mean)

    def saved(key: str) -> float:
        """The share of the FLOPs that is saved by switching this setting over."""
        changed = _with_setting(run.config, key.split("."), not _setting(run, key))
        return 1 - method_of(changed).step_flops(mean) / now

    for key in method.savings:
        with suppress(ConfigError):  # compile = cuda_graphs forbids one of the savings
            if not _setting(run, key) and (share := saved(key)) > 0:
                yield Suggestion(key, True, f"gives the same numbers with {share:.1%} less arithmetic")
    if run.config.model.activation_checkpointing:
        config = _with_setting(run.config, ["model", "activation_checkpointing"], False)
        if (needed := dataclasses.replace(run, config=config).memory_needed()) <= run.memory:
            share = saved("model.activation_checkpointing")
            memory = f"{format_bytes(needed)} of {format_bytes(run.memory)} available"
            why = f"the run fits without it ({memory}), with {share:.0%} less arithmetic"
            yield Suggestion("model.activation_checkpointing", False, why)


def _setting(run: Run, key: str) -> Any:
    value: Any = run.config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def _larger_micro_batch(run: Run) -> Iterator[Suggestion]:
    share, micro = run.config.global_batch_size // run.ranks, run.sizes.micro
    if micro not in run.step:
        return
    fitting = [n for n in run.step if n > micro and share % n == 0 and run.memory_needed(n) <= run.memory]
    best = max(fitting, key=lambda n: run.step[n].images_per_second, default=micro)
    gain = run.step[best].images_per_second / run.step[micro].images_per_second
    if gain >= _MIN_GAIN:
        why = f"measured: {gain - 1:+.0%} images/s in the step, with less accumulation"
        yield Suggestion("micro_batch_size", best, why)


def _stage(run: Run) -> Iterator[Suggestion]:
    if not run.step_rate:
        return
    chosen = recommend([run.plan_at(stage) for stage in _zero_stages(run)])
    now = run.plan_at(run.stage).images_per_second
    if chosen and now and chosen[0].images_per_second >= _MIN_GAIN * now:
        plan, why = chosen
        gain = plan.images_per_second / now - 1
        reason = f"{gain:+.0%} images/s by the formulas of fastjepa.plan: {why}"
        yield Suggestion(_DS_CONFIG, _ds_config_file(plan.stage), reason)


def _loader(run: Run) -> Iterator[Suggestion]:
    before = find_limit(run)
    if not before.images_per_second:
        return

    def speed(threads: int) -> float:
        return find_limit(applied(run, [Suggestion("data.num_threads", threads, "")])).images_per_second or 0.0

    best = max(map(speed, run.loader))
    fewest = next(threads for threads in sorted(run.loader) if speed(threads) >= 0.98 * best)
    if speed(fewest) >= _MIN_GAIN * before.images_per_second:
        delivered = format_rate(run.loader_rate_with(fewest))
        yield Suggestion("data.num_threads", fewest, f"measured: the loader then delivers {delivered} images/s")
        before = find_limit(applied(run, [Suggestion("data.num_threads", fewest, "")]))
    if before.limit == "loader":
        if not run.config.data.dct_scaling:
            yield Suggestion(
                "data.dct_scaling", True, "large JPEG files are then decoded at 1/2, 1/4 or 1/8 of their size"
            )
        if run.gpu and run.dali_works and run.config.data.loader == "turbo":
            yield Suggestion("data.loader", "auto", "DALI works here, and decodes on the GPU")
