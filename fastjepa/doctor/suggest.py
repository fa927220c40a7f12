"""Settings that would make a run start, or faster: only those that would change something, each with its reason."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import yaml

from fastjepa.config import Savings
from fastjepa.doctor.limits import GIB, Run, Verdict, amount, judge, memory_formula
from fastjepa.errors import ConfigError
from fastjepa.objectives.ijepa import costs
from fastjepa.objectives.ijepa.costs import STAGES, Stage
from fastjepa.plan import zero
from fastjepa.plan.planner import recommend

_WORTH_IT = 1.05  # a smaller gain is within the error of measurements this short
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
        """As the command line has it."""
        value = str(self.value).lower() if isinstance(self.value, bool) else self.value
        return f"{self.key} {value}" if self.key == _DS_CONFIG else f"{self.key}={value}"


def suggest(run: Run) -> list[Suggestion]:
    """For a run whose batch can be shared out (`shares`), in the order in which they build on one another."""
    found: list[Suggestion] = []
    for rule in (_precision, _memory, _arithmetic, _larger_micro_batch, _stage, _loader):
        for suggestion in rule(run):
            found.append(suggestion)
            run = applied(run, [suggestion])
    last = {suggestion.key: suggestion for suggestion in found}  # a later one takes an earlier one's place
    return list(last.values())


def applied(run: Run, suggestions: Sequence[Suggestion]) -> Run:
    """The run with what was suggested."""
    for suggestion in suggestions:
        if suggestion.key == _DS_CONFIG:
            run = dataclasses.replace(run, stage=next(s for s in STAGES if _ds_config(s) == suggestion.value))
        else:
            run = dataclasses.replace(run, config=_replace(run.config, suggestion.key.split("."), suggestion.value))
    wish = run.config.precision
    return dataclasses.replace(run, bf16=wish == "bf16" or (wish == "auto" and run.gpu and run.bf16_is_fast))


def _replace(section: _Section, keys: list[str], value: object) -> _Section:
    first, *rest = keys
    new: Any = _replace(getattr(section, first), rest, value) if rest else value
    return dataclasses.replace(section, **{first: new})  # type: ignore[type-var]


def _ds_config(stage: object) -> str:
    return f"configs/zero{stage}.json"


def as_yaml(suggestions: Sequence[Suggestion]) -> str:
    """Lines for the configuration's file."""
    settings: dict[str, Any] = {}
    for suggestion in suggestions:
        if suggestion.key != _DS_CONFIG:
            *sections, name = suggestion.key.split(".")
            inner = settings
            for section in sections:
                inner = inner.setdefault(section, {})
            inner[name] = suggestion.value
    return yaml.safe_dump(settings, sort_keys=False) if settings else ""


def command(
    run: Run,
    config_file: str | None,
    overrides: Sequence[str],
    ds_config: str | None,
    suggestions: Sequence[Suggestion],
) -> str:
    """What starts the run with what was suggested. A later argument takes the place of an earlier one of its key."""
    launch = {s.key: s.value for s in suggestions if s.key == _DS_CONFIG}
    settings = dict(override.partition("=")[::2] for override in overrides)
    settings |= {s.key: s.argument.partition("=")[2] for s in suggestions if s.key != _DS_CONFIG}
    file = launch.get(_DS_CONFIG, ds_config)
    here = f"--num_gpus {run.ranks}" if run.gpu else f"--num_accelerators {run.ranks}"
    if file:
        start = f"deepspeed {here} fastjepa/train.py {_DS_CONFIG} {shlex.quote(str(file))}"
    elif run.ranks > 1:
        start = f"torchrun --nproc_per_node {run.ranks} fastjepa/train.py"
    else:
        start = "python fastjepa/train.py"
    file_words = ["--config", config_file] if config_file else []
    return f"{start} {shlex.join([*file_words, *(f'{key}={value}' for key, value in settings.items())])}".strip()


def what_to_do(run: Run, verdict: Verdict, suggestions: Sequence[Suggestion]) -> str:
    """After the verdict's sentence: what is gained by the suggestions, or what else would help."""
    after = judge(applied(run, suggestions))
    if verdict.limit == "memory":
        if after.limit != "memory":
            return f"with the settings below it fits, and is {after.sentence}"
        return "use a smaller model, larger patches, smaller images, or more ranks (--ranks)"
    before = verdict.images_per_second
    if before and after.images_per_second and after.images_per_second >= _WORTH_IT * before:
        gain = after.images_per_second / before - 1
        return f"the settings below make it about {amount(after.images_per_second)} images/s ({gain:+.0%})"
    return {
        "loader": "no number of threads that was tried delivers more: smaller files, a faster disk or more cores would",
        "step": "as it should be: fastjepa/train.py --profile shows what its time goes into",
        "cores": "more cores, or a GPU",
        "communication": "a faster link, or more images per rank and step (global_batch_size)",
        None: "see the problems above",
    }[verdict.limit]


def shares(run: Run) -> list[Suggestion]:
    """Sizes of batches that ranks and micro batches divide; none if they do."""
    found = []
    config, ranks = run.config, run.ranks
    total = config.global_batch_size
    if total % ranks:
        total = max(1, round(total / ranks)) * ranks
        why = f"{config.global_batch_size} cannot be shared out over {ranks} ranks (or start others)"
        found.append(Suggestion("global_batch_size", total, why))
    micro, share = config.micro_batch_size, total // ranks
    if micro is not None and share % min(micro, share):
        smaller = max(n for n in range(1, min(micro, share)) if share % n == 0)
        why = f"a rank's share of {share} images is no multiple of {micro}"
        found.append(Suggestion("micro_batch_size", smaller, why))
    return found


# The rules


def _precision(run: Run) -> Iterator[Suggestion]:
    if run.gpu and run.bf16_is_fast and run.config.precision == "fp32":
        yield Suggestion(
            "precision", "auto", "this GPU has bf16, which halves memory and uses its matrix units; fp32 does not"
        )
    elif not run.bf16_is_fast and run.config.precision == "bf16":
        yield Suggestion("precision", "auto", "this device has no instructions for bf16: fp32 is faster")


def _memory(run: Run) -> Iterator[Suggestion]:
    if run.memory_needed() <= run.memory:
        return
    needed = f"a micro batch of {run.sizes.micro} needs {run.memory_needed() / GIB:.1f} of {run.memory / GIB:.1f} GiB"
    share = run.config.global_batch_size // run.ranks
    lean = _replace(run.config, ["model", "activation_checkpointing"], True)
    stages = [run.stage, *(stage for stage in _zero_stages(run) if stage not in (0, run.stage))]
    for config in (run.config, lean):
        for stage in stages:
            state, per_image = memory_formula(config, stage, run.ranks, bf16=run.bf16)
            micro = zero.largest_micro_batch(per_image, run.memory - state, share)
            if not micro:
                continue
            fits = f"{(state + micro * per_image) / GIB:.1f} GiB"
            if stage != run.stage:
                yield Suggestion(_DS_CONFIG, _ds_config(stage), f"{needed}; ZeRO {stage} shards the state")
            if config is lean:
                yield Suggestion("model.activation_checkpointing", True, f"{needed}; for one more forward pass")
            if micro < run.sizes.micro:
                why = f"{needed}; so it fits in {fits}, by more accumulation: the same steps"
                yield Suggestion("micro_batch_size", micro, why)
            return


def _zero_stages(run: Run) -> list[Stage]:
    """That the run could be started with, and gain by."""
    if run.ranks == 1 or run.config.compile == "cuda_graphs":
        return []
    return [stage for stage in STAGES if stage != "torch" and (stage != 3 or run.config.compile != "blocks")]


def _arithmetic(run: Run) -> Iterator[Suggestion]:
    """What is computed for nothing."""
    mean, _ = costs.sample_tokens(run.config.masks, run.config.grid_h, run.config.grid_w)
    now = costs.flops_per_image(run.config, mean)

    def less(key: str) -> float:
        return 1 - costs.flops_per_image(_replace(run.config, key.split("."), not _value(run, key)), mean) / now

    for name in Savings.__dataclass_fields__:
        key = f"objective.savings.{name}"
        with suppress(ConfigError):  # compile = cuda_graphs forbids one of them
            if not _value(run, key) and (share := less(key)) > 0:
                yield Suggestion(key, True, f"the same numbers for {share:.1%} less arithmetic")
    if run.config.model.activation_checkpointing:
        config = _replace(run.config, ["model", "activation_checkpointing"], False)
        if (needed := dataclasses.replace(run, config=config).memory_needed()) <= run.memory:
            share = less("model.activation_checkpointing")
            why = f"it fits without ({needed / GIB:.1f} of {run.memory / GIB:.1f} GiB), for {share:.0%} less arithmetic"
            yield Suggestion("model.activation_checkpointing", False, why)


def _value(run: Run, key: str) -> Any:
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
    if gain >= _WORTH_IT:
        yield Suggestion(
            "micro_batch_size", best, f"measured: {gain - 1:+.0%} images/s in the step, by less accumulation"
        )


def _stage(run: Run) -> Iterator[Suggestion]:
    if not run.stepped:
        return
    chosen = recommend([run.planned(stage) for stage in _zero_stages(run)])
    now = run.planned(run.stage).images_per_second
    if chosen and now and chosen[0].images_per_second >= _WORTH_IT * now:
        plan, why = chosen
        gain = plan.images_per_second / now - 1
        yield Suggestion(
            _DS_CONFIG, _ds_config(plan.stage), f"{gain:+.0%} images/s by the formulas of fastjepa.plan: {why}"
        )


def _loader(run: Run) -> Iterator[Suggestion]:
    before = judge(run)
    if not before.images_per_second:
        return

    def speed(threads: int) -> float:
        return judge(applied(run, [Suggestion("data.num_threads", threads, "")])).images_per_second or 0.0

    best = max(map(speed, run.loader))
    fewest = next(threads for threads in sorted(run.loader) if speed(threads) >= 0.98 * best)
    if speed(fewest) >= _WORTH_IT * before.images_per_second:
        delivered = amount(run.loaded_with(fewest))
        yield Suggestion("data.num_threads", fewest, f"measured: the loader then delivers {delivered} images/s alone")
        before = judge(applied(run, [Suggestion("data.num_threads", fewest, "")]))
    if before.limit == "loader":
        if not run.config.data.dct_scaling:
            yield Suggestion("data.dct_scaling", True, "large JPEG files are decoded at 1/2, 1/4 or 1/8 of their size")
        if run.unused_decoder:
            yield Suggestion("data.loader", "auto", "DALI works here, and decodes on the GPU")
