"""Formulas for the bytes that a rank holds and sends, for plain PyTorch and each ZeRO stage.

They describe what this code and DeepSpeed 0.19.8 do with `configs/zero0.json` to `zero3.json`, which is more than the
minimum that the ZeRO papers give. `python -m benchmarks.proofs.bytes` holds them against measurements.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from fastjepa.config import Config
from fastjepa.objectives.registry import method_of
from fastjepa.optim.groups import FLAT_ALIGNMENT, param_groups

Stage = Literal["torch", 0, 1, 2, 3]
"""Plain PyTorch, or a ZeRO stage."""
STAGES: tuple[Stage, ...] = ("torch", 0, 1, 2, 3)

FP32, BF16 = 4, 2  # bytes


class Group(NamedTuple):
    """A parameter group, as `fastjepa.optim.groups.param_groups` makes it."""

    part: str
    is_average: bool
    """True if the group is the EMA of another one."""
    numels: tuple[int, ...]
    """Number of elements of each parameter."""


@dataclass(frozen=True)
class Parameters:
    """The sizes of the parameters of an objective."""

    groups: tuple[Group, ...]

    def of_part(self, part: str) -> int:
        """Number of elements of one part."""
        return sum(sum(group.numels) for group in self.groups if group.part == part)

    @property
    def parts(self) -> dict[str, int]:
        """Number of elements of each part, in the order in which the forward pass needs the parts."""
        return {group.part: self.of_part(group.part) for group in self.groups}

    @property
    def trained(self) -> int:
        """Number of elements of the parts that have gradients."""
        return sum(sum(group.numels) for group in self.groups if not group.is_average)

    @property
    def averaged(self) -> int:
        """Number of elements of the parts that are averages of others."""
        return sum(sum(group.numels) for group in self.groups if group.is_average)

    @property
    def total(self) -> int:
        return self.trained + self.averaged


@functools.lru_cache
def parameters_of(config: Config) -> Parameters:
    """The sizes of the parameters of a run's objective. It is built on the meta device and takes no memory."""
    with torch.device("meta"):
        parts = method_of(config).build().parts
    return Parameters(
        tuple(
            Group(group["part"], bool(group["ema_of"]), tuple(p.numel() for p in group["params"]))
            for group in param_groups(parts)
        )
    )


@dataclass(frozen=True)
class ZeroSettings:
    """Settings of `configs/zeroN.json`, and defaults of DeepSpeed, that the bytes depend on. All are numbers of elements."""

    reduce_bucket_size: int = 50_000_000
    reduce_bucket_size_stage0: int = 500_000_000
    stage3_param_persistence_threshold: int = 100_000
    """Stage 3 keeps parameters of at most this size whole on every rank."""
    stage3_max_reuse_distance: int = 1_000_000_000
    """Stage 3 does not release a parameter that is used again before this many other elements have been used."""
    stage3_prefetch_bucket_size: int = 50_000_000


ZERO_SETTINGS = ZeroSettings()


def _held_elements(numels: Sequence[int], stage: Stage, gpus: int) -> int:
    """Elements of a parameter group that a rank holds, with padding: its shard, or everything if groups are not sharded."""
    total = sum(numels)
    if stage == "torch":
        return -(-total // FLAT_ALIGNMENT) * FLAT_ALIGNMENT  # one flat buffer (fastjepa.optim.groups.flatten_groups)
    if stage == 0:
        return total
    if stage == 3:
        return sum(-(-numel // gpus) for numel in numels)  # each parameter is sharded by itself
    return -(-total // (2 * gpus)) * 2  # one flat buffer, aligned to two elements a rank


@dataclass(frozen=True)
class State:
    """Bytes of training state on one rank."""

    weights: int
    """Weights as the forward pass reads them, averages included."""
    gradients: int
    """Gradients, summed over micro batches."""
    masters: int
    """fp32 copies of the weights, if the model's own are bf16."""
    ema: int
    """fp32 averages, if they are separate from the model's weights."""
    moments: int
    """AdamW's moments, fp32."""
    buckets: int
    """Buffers that DeepSpeed keeps for sending gradients."""
    passing: int
    """Added at the worst moment of a step: gathered weights, autocast's copies, fp32 gradients of a group being updated."""

    @property
    def resident(self) -> int:
        return self.weights + self.gradients + self.masters + self.ema + self.moments + self.buckets

    @property
    def peak(self) -> int:
        return self.resident + self.passing


def state_bytes(
    config: Config, stage: Stage, gpus: int, *, bf16: bool = True, zero: ZeroSettings = ZERO_SETTINGS
) -> State:
    """State of the rank that holds the most, between two micro batches; `passing` is what the worst moment adds."""
    parameters = parameters_of(config)
    held = [_held_elements(group.numels, stage, gpus) for group in parameters.groups]
    all_held = sum(held)
    averages = sum(h for h, group in zip(held, parameters.groups, strict=True) if group.is_average)
    trained = all_held - averages
    copies = BF16 if bf16 else 0
    if stage in ("torch", 0):
        # At stage 0 the averages do not require gradients, and autocast keeps no copies of such weights.
        passing = copies * (all_held if stage == "torch" else trained)
        if stage == 0 and gpus > 1:
            passing += FP32 * min(trained, zero.reduce_bucket_size_stage0)
        return State(FP32 * all_held, FP32 * trained, 0, 0, 2 * FP32 * trained, 0, passing)
    low = BF16 if bf16 else FP32
    at_update = FP32 * max(held)  # one group at a time, in fp32
    if stage == 3:
        persistent = live = 0
        if gpus > 1:  # the shards of a single rank are whole parameters
            persistent = sum(_persistent(parameters, zero))
            live = min(_kept(parameters, zero) + zero.stage3_prefetch_bucket_size, parameters.total) - persistent
        weights = low * (all_held + persistent)
        gradients = low * all_held
        buckets, passing = low * zero.reduce_bucket_size, max(low * live, at_update)
    else:
        weights = low * gpus * all_held  # whole, with the padding
        buckets, passing = 2 * low * zero.reduce_bucket_size, at_update
        if stage == 1:
            gradients = low * parameters.trained
        else:
            gradients = low * _whole_parameters(parameters, gpus)
            buckets, passing = 0, max(buckets, at_update)  # held during a backward pass only
    return State(weights, gradients, FP32 * trained, FP32 * averages, 2 * FP32 * trained, buckets, passing)


def _whole_parameters(parameters: Parameters, gpus: int) -> int:
    """Elements of gradients that a rank holds at stage 2: the maximum over the ranks.

    DeepSpeed keeps the whole gradient of every parameter of which the rank's shard holds a part. Averages count twice: for
    their gradients, which never come, it holds both an empty place and zeros.
    """
    held = [0] * gpus
    for group in parameters.groups:
        share, start = _held_elements(group.numels, 2, gpus), 0
        for numel in group.numels:
            for rank in range(start // share, (start + numel - 1) // share + 1):
                held[rank] += numel * (2 if group.is_average else 1)
            start += numel
    return max(held)


def _persistent(parameters: Parameters, zero: ZeroSettings) -> list[int]:
    """Sizes of the parameters that stage 3 leaves whole on every rank, because they are small."""
    return [n for group in parameters.groups for n in group.numels if n <= zero.stage3_param_persistence_threshold]


def _kept(parameters: Parameters, zero: ZeroSettings) -> int:
    """Elements of trained parameters that stage 3 keeps whole from their forward pass to their backward pass.

    The backward pass uses parameters in reverse order: between the two uses of one, all that come after it are used twice.
    """
    return min(parameters.trained, zero.stage3_max_reuse_distance // 2)


class Traffic(NamedTuple):
    """Bytes that one rank sends in an optimizer step.

    Collectives run in rings of N ranks: an all-reduce of n bytes sends 2 (N-1)/N n, an all-gather or a reduce-scatter
    (N-1)/N n.
    """

    gradients: float
    weights: float
    """Bytes sent in all-gathers of weights, including those of averages."""

    @property
    def total(self) -> float:
        return self.gradients + self.weights


def bytes_sent(
    config: Config, stage: Stage, gpus: int, accum: int, *, bf16: bool = True, zero: ZeroSettings = ZERO_SETTINGS
) -> Traffic:
    """Bytes that DeepSpeed sends with our settings. The few bytes of norms and flags are left out.

    Stages 1 and 2 all-reduce whole gradient buckets, of which a rank keeps its share. Stage 1 reduces gradients once per
    step, stages 2 and 3 once per micro batch. Stage 3 gathers small parameters once per step, and large ones when they are
    used: once per micro batch, or twice if DeepSpeed releases them between forward and backward pass.
    """
    parameters = parameters_of(config)
    ring = (gpus - 1) / gpus
    if stage == "torch":
        padded = sum(_held_elements(group.numels, stage, gpus) for group in parameters.groups if not group.is_average)
        return Traffic(2 * ring * FP32 * padded, 0.0)
    if stage == 0:
        return Traffic(2 * ring * FP32 * parameters.trained, 0.0)
    low = BF16 if bf16 else FP32
    if stage in (1, 2):
        reduced = parameters.trained * (accum if stage == 2 else 1)
        gathered = gpus * sum(_held_elements(group.numels, stage, gpus) for group in parameters.groups)
        return Traffic(2 * ring * low * reduced, ring * low * gathered)
    threshold = zero.stage3_param_persistence_threshold
    small = large = reduced = used_again = 0
    for group in parameters.groups:
        large_numels = [n for n in group.numels if n > threshold]
        small += gpus * _held_elements([n for n in group.numels if n <= threshold], 3, gpus)
        large += gpus * _held_elements(large_numels, 3, gpus)
        if not group.is_average:
            reduced += gpus * _held_elements(group.numels, 3, gpus)
            used_again += sum(large_numels)
    again = max(0, used_again - _kept(parameters, zero))
    return Traffic(ring * low * accum * reduced, ring * low * (small + accum * (large + again)))


def waited_collectives(config: Config, stage: Stage) -> int:
    """Number of collectives that a step waits for, one after the other, however little they send.

    They are the norms of the parameter groups and the weights of the first part; at stage 3 also every small parameter,
    because DeepSpeed gathers each by itself.
    """
    parameters, zero = parameters_of(config), ZERO_SETTINGS
    if stage == "torch":
        return sum(not group.is_average for group in parameters.groups)
    if stage == 0:
        return -(-parameters.trained // zero.reduce_bucket_size_stage0)
    if stage == 3:
        return len(parameters.groups) + len(_persistent(parameters, zero))
    return len(parameters.groups) + 2


def largest_micro_batch(per_image: float, free: float, share: int) -> int:
    """The largest divisor of `share`, a rank's part of the global batch, whose activations fit; 0 if no image fits."""
    fitting = [d for d in range(1, share + 1) if share % d == 0 and d * per_image <= free]
    return max(fitting, default=0)
