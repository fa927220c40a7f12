"""The figures of a run, measured and estimated, and the verdict that follows from them: what limits it. Pure functions."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from fastjepa.config import Config
from fastjepa.config.batch_sizes import BatchSizes
from fastjepa.engine.slices import slice_size
from fastjepa.host import GIB, MIB
from fastjepa.plan.planner import Plan, communication, memory_formula
from fastjepa.plan.zero import Stage, largest_micro_batch, parameters_of

Limit = Literal["loader", "step", "cores", "communication", "memory"]


@dataclass(frozen=True)
class Rate:
    """The speed of one rank, measured alone on its machine."""

    images_per_second: float
    cpu_seconds: float
    """CPU time per image, summed over all threads of the rank."""


@dataclass(frozen=True)
class Link:
    """How fast the ranks send to one another."""

    bytes_per_second: float
    """Bytes/s that each rank sends, in a ring."""
    latency: float
    """Seconds of a collective on a single value."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run as it is configured, and what was measured of it so far."""

    config: Config
    stage: Stage
    ranks: int
    gpu: bool
    bf16: bool
    bf16_is_fast: bool
    """The device has instructions for bf16."""
    cores: float
    """CPU cores that one rank may keep busy."""
    memory: float
    """Bytes that one rank may fill."""
    loader: dict[int, Rate] = dataclasses.field(default_factory=dict)
    """data.num_threads -> the rate measured with it."""
    step: dict[int, Rate] = dataclasses.field(default_factory=dict)
    """Images per micro batch -> the rate measured with it."""
    estimated_step: float | None = None
    """Images/s of one rank, from its FLOPs and the speed of matrix products, for a step too slow to be measured."""
    link: Link | None = None
    """None: there is one rank, or the measurement failed."""
    dali_works: bool = False
    """DALI decodes correctly on this machine."""

    @property
    def sizes(self) -> BatchSizes:
        """How the ranks and micro batches share the global batch.

        Raises:
            ConfigError: the global batch cannot be divided among them.
        """
        return BatchSizes.share(self.config, self.ranks)

    @property
    def loader_rate(self) -> float | None:
        """Images/s that the loaders of all ranks deliver together; None: not measured."""
        threads = self.config.data.num_threads
        return self.loader_rate_with(threads) if threads in self.loader else None

    def loader_rate_with(self, threads: int) -> float:
        """The same with another data.num_threads, one that was measured. No rank gets more than its share of the cores."""
        rate = self.loader[threads]
        return self.ranks * min(rate.images_per_second, self.cores / rate.cpu_seconds)

    @property
    def step_rate(self) -> float | None:
        """Images/s of the steps of all ranks, which wait neither for images nor for one another; None: unknown."""
        if rate := self._measured_step:
            return self.ranks * rate.images_per_second
        return self.ranks * self.estimated_step if self.estimated_step else None

    @property
    def _measured_step(self) -> Rate | None:
        """The rate at the micro batch, or at the nearest one that was measured."""
        if not self.step:
            return None
        micro = self.sizes.micro
        return self.step[min(self.step, key=lambda size: abs(size - micro))]

    @property
    def cores_rate(self) -> float | None:
        """Images/s at which loader and step together keep all cores busy; None: not measured."""
        loader, step = self.loader.get(self.config.data.num_threads), self._measured_step
        return self.ranks * self.cores / (loader.cpu_seconds + step.cpu_seconds) if loader and step else None

    def memory_needed(self, micro: int | None = None) -> float:
        """Bytes of one rank at the moment that needs most, by formula."""
        state, per_image = memory_formula(self.config, self.stage, self.ranks, bf16=self.bf16)
        images = micro or self.sizes.micro
        if self.stage == "torch" and not self.gpu:
            images = slice_size(images, per_image)
        return state + images * per_image

    def plan_at(self, stage: Stage) -> Plan:
        """The run at another ZeRO stage: the micro batch that fits, communication, images/s without waits for images."""
        share = self.config.global_batch_size // self.ranks
        state, per_image = memory_formula(self.config, stage, self.ranks, bf16=self.bf16)
        micro = min(largest_micro_batch(per_image, self.memory - state, share), self.sizes.micro)
        if not micro or not self.step_rate:
            return Plan(stage, state, per_image)
        accum = share // micro
        compute, exposed, sent = self.config.global_batch_size / self.step_rate, 0.0, 0.0
        if self.link:
            sent, exposed = communication(
                self.config, stage, self.ranks, accum, compute=compute, link=self.link.bytes_per_second,
                latency=self.link.latency, bf16=self.bf16,
            )  # fmt: skip
        speed = self.config.global_batch_size / (compute + exposed)
        return Plan(stage, state, per_image, micro, accum, sent, compute, 0.0, exposed, speed)


def checkpoint_bytes(config: Config) -> int:
    """Bytes of a checkpoint: fp32 weights, both moments and the EMA in shards, and the weights once more for readers."""
    parameters = parameters_of(config)
    return 4 * (3 * parameters.trained + parameters.averaged + parameters.total)


@dataclass(frozen=True)
class Verdict:
    limit: Limit | None
    """None: unknown."""
    sentence: str
    images_per_second: float | None = None
    """Expected images/s, summed over the ranks."""


def find_limit(run: Run) -> Verdict:
    """What limits the run, in one sentence. Its images/s are summed over the ranks."""
    needed = run.memory_needed()
    if needed > run.memory:
        return Verdict(
            "memory",
            f"limited by memory: a micro batch of {run.sizes.micro} images needs {format_bytes(needed)}, "
            f"{format_bytes(run.memory)} are available",
        )
    loader, step = run.loader_rate, run.step_rate
    if loader is None or step is None:
        missing = " and ".join(name for name, rate in (("loader", loader), ("step", step)) if rate is None)
        return Verdict(None, f"unknown: the {missing} could not be measured")
    plan = run.plan_at(run.stage)
    with_link = plan.images_per_second or step
    estimated = "" if run.step else " (estimated from its FLOPs)"
    trains = f"the step trains {format_rate(step)}{estimated}"
    threads = run.config.data.num_threads
    summed = f" ({run.ranks} ranks together)" if run.ranks > 1 else ""
    if loader < with_link:
        return Verdict(
            "loader",
            f"limited by the loader: it delivers {format_rate(loader)} images/s with data.num_threads = {threads}, "
            f"{trains}{summed}",
            loader,
        )
    with_cores = min(run.cores_rate or with_link, with_link)
    delivers = f"the loader delivers {format_rate(loader)}"
    if with_cores < 0.8 * with_link:
        return Verdict(
            "cores",
            f"limited by the CPU cores, which loader and step share: alone {delivers} images/s and {trains}, together they "
            f"reach about {format_rate(with_cores)}{summed}",
            with_cores,
        )
    if plan.exposed_seconds > 0.25 * plan.step_seconds:
        share = plan.exposed_seconds / plan.step_seconds
        return Verdict(
            "communication",
            f"limited by communication: a step spends {share:.0%} of its time waiting for it; {format_rate(with_link)} "
            f"images/s with it, {format_rate(step)} without, {delivers}{summed}",
            with_cores,
        )
    sentence = f"limited by the step: it trains {format_rate(with_link)} images/s{estimated}, {delivers}{summed}"
    return Verdict("step", sentence, with_cores)


def format_rate(rate: float) -> str:
    """Write images/s with three digits."""
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def format_bytes(number: float) -> str:
    """Write bytes in GiB, or in MiB below a tenth of a GiB."""
    return f"{number / GIB:.1f} GiB" if number >= GIB / 10 else f"{number / MIB:.1f} MiB"
