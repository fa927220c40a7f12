"""What limits a run: figures measured and reckoned, and the verdict that follows from them. All of it pure functions."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from fastjepa.config import Config
from fastjepa.config.batch_sizes import BatchSizes
from fastjepa.engine.slices import slice_size
from fastjepa.objectives.ijepa import costs
from fastjepa.objectives.ijepa.costs import Stage
from fastjepa.plan import zero
from fastjepa.plan.planner import Plan, communication

GIB = 2**30

Limit = Literal["loader", "step", "cores", "communication", "memory"]


@dataclass(frozen=True)
class Rate:
    """Of one rank, alone on its machine."""

    images_per_second: float
    cpu_seconds: float
    """Of all its threads together, per image."""


@dataclass(frozen=True)
class Link:
    """How ranks send to one another."""

    bytes_per_second: float
    """Sent by each rank, in a ring."""
    latency: float
    """Seconds of a collective that sends next to nothing."""


@dataclass(frozen=True, kw_only=True)
class Run:
    config: Config
    stage: Stage
    ranks: int
    gpu: bool
    bf16: bool
    bf16_is_fast: bool
    """The device has instructions for it."""
    cores: float
    """That one rank may keep busy."""
    memory: float
    """Bytes that one rank may fill."""
    loader: dict[int, Rate] = dataclasses.field(default_factory=dict)
    """data.num_threads -> what was measured."""
    step: dict[int, Rate] = dataclasses.field(default_factory=dict)
    """Images per micro batch -> what was measured, on one rank."""
    estimated_step: float | None = None
    """Images/s of a rank by arithmetic, where the step was too long to be measured."""
    link: Link | None = None
    """None: one rank."""
    unused_decoder: bool = False
    """DALI works on this GPU, and data.loader leaves it out."""

    @property
    def sizes(self) -> BatchSizes:
        """
        Raises:
            ConfigError: the global batch cannot be shared out.
        """
        return BatchSizes.share(self.config, self.ranks)

    @property
    def loaded(self) -> float | None:
        """Images/s that all ranks' loaders deliver: several on one machine share its cores."""
        rate = self.loader.get(self.config.data.num_threads)
        return self._loaded(rate) if rate else None

    def _loaded(self, rate: Rate) -> float:
        return self.ranks * min(rate.images_per_second, self.cores / rate.cpu_seconds)

    def loaded_with(self, threads: int) -> float:
        return self._loaded(self.loader[threads])

    @property
    def stepped(self) -> float | None:
        """Images/s of all ranks' steps, without a wait for images or other ranks."""
        if rate := self._step_rate:
            return self.ranks * rate.images_per_second
        return self.ranks * self.estimated_step if self.estimated_step else None

    @property
    def _step_rate(self) -> Rate | None:
        """Measured at the micro batch, or at the one next to it that could be."""
        if not self.step:
            return None
        micro = self.sizes.micro
        return self.step[min(self.step, key=lambda size: abs(size - micro))]

    @property
    def cores_allow(self) -> float | None:
        """Images/s at which loader and step together would keep all cores busy."""
        loader, step = self.loader.get(self.config.data.num_threads), self._step_rate
        return self.ranks * self.cores / (loader.cpu_seconds + step.cpu_seconds) if loader and step else None

    def memory_needed(self, micro: int | None = None) -> float:
        """Bytes of one rank at the heaviest moment, by formula."""
        state, per_image = memory_formula(self.config, self.stage, self.ranks, bf16=self.bf16)
        images = micro or self.sizes.micro
        if self.stage == "torch" and not self.gpu:
            images = slice_size(images, per_image)
        return state + images * per_image

    def planned(self, stage: Stage) -> Plan:
        """The run at a stage: micro batch that fits, communication, images/s without a wait for images."""
        share = self.config.global_batch_size // self.ranks
        state, per_image = memory_formula(self.config, stage, self.ranks, bf16=self.bf16)
        micro = min(zero.largest_micro_batch(per_image, self.memory - state, share), self.sizes.micro)
        if not micro or not self.stepped:
            return Plan(stage, state, per_image)
        accum = share // micro
        compute, exposed, sent = self.config.global_batch_size / self.stepped, 0.0, 0.0
        if self.link:
            sent, exposed = communication(
                self.config, stage, self.ranks, accum, compute=compute, link=self.link.bytes_per_second,
                latency=self.link.latency, bf16=self.bf16,
            )  # fmt: skip
        speed = self.config.global_batch_size / (compute + exposed)
        return Plan(stage, state, per_image, micro, accum, sent, compute, 0.0, exposed, speed)


def memory_formula(config: Config, stage: Stage, ranks: int, *, bf16: bool) -> tuple[int, float]:
    """Bytes of one rank: state, and what each image of a micro batch adds."""
    _, heaviest = costs.sample_tokens(config.masks, config.grid_h, config.grid_w)
    state = zero.state_bytes(config, stage, ranks, bf16=bf16).peak
    return state, costs.activation_bytes(config, heaviest, stage, bf16=bf16)


def checkpoint_bytes(config: Config) -> int:
    """fp32 weights, two moments and the EMA, in shards; and the weights alone once more."""
    encoder, predictor = costs.count_parameters(config)
    return 4 * (3 * (encoder + predictor) + encoder + (2 * encoder + predictor))


@dataclass(frozen=True)
class Verdict:
    limit: Limit | None
    """None: not known."""
    sentence: str
    images_per_second: float | None = None
    """That may be expected, of all ranks."""


def judge(run: Run) -> Verdict:
    """What limits the run, in one sentence."""
    needed = run.memory_needed()
    if needed > run.memory:
        return Verdict(
            "memory",
            f"limited by memory: a micro batch of {run.sizes.micro} images needs {needed / GIB:.1f} GiB, "
            f"{run.memory / GIB:.1f} GiB can be had",
        )
    loaded, stepped = run.loaded, run.stepped
    if loaded is None or stepped is None:
        missing = " and ".join(name for name, rate in (("loader", loaded), ("step", stepped)) if rate is None)
        return Verdict(None, f"not known: the {missing} could not be measured")
    plan = run.planned(run.stage)
    together = plan.images_per_second or stepped
    reckoned = "" if run.step else " by its arithmetic"
    step = f"the step takes {amount(stepped)}{reckoned}"
    threads = run.config.data.num_threads
    if loaded < together:
        return Verdict(
            "loader",
            f"limited by the loader: it delivers {amount(loaded)} images/s with data.num_threads = {threads}, {step}",
            loaded,
        )
    cores = min(run.cores_allow or together, together)
    delivers = f"the loader delivers {amount(loaded)}"
    if cores < 0.8 * together:
        return Verdict(
            "cores",
            f"limited by the CPU cores, which loader and step share: alone {delivers} images/s and {step}, together about "
            f"{amount(cores)}",
            cores,
        )
    if plan.exposed_seconds > 0.25 * plan.step_seconds:
        share = plan.exposed_seconds / plan.step_seconds
        return Verdict(
            "communication",
            f"limited by communication: {share:.0%} of a step wait for it; {amount(together)} images/s with it, "
            f"{amount(stepped)} without, {delivers}",
            cores,
        )
    return Verdict("step", f"limited by the step: it takes {amount(together)} images/s{reckoned}, {delivers}", cores)


def amount(rate: float) -> str:
    """Of images/s, in three digits."""
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"
