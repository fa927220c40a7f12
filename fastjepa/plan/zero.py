"""Bytes that a rank holds and sends, by formula, for plain PyTorch and each ZeRO stage.

The formulas describe what the code and DeepSpeed 0.19.8 do with `configs/zero0.json` to `zero3.json`, not what the papers on
ZeRO say that they could; `python -m benchmarks.proofs.bytes` measures them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from fastjepa.config import Config
from fastjepa.objectives.ijepa.costs import BF16, FP32, Stage, count_parameters, parameter_sizes


@dataclass(frozen=True)
class ZeroSettings:
    """What of `configs/zeroN.json`, and of DeepSpeed's defaults, decides about bytes. All are numbers of elements."""

    reduce_bucket_size: int = 50_000_000
    reduce_bucket_size_stage0: int = 500_000_000
    stage3_param_persistence_threshold: int = 100_000
    """Smaller parameters are whole on every rank."""
    stage3_max_reuse_distance: int = 1_000_000_000
    """A parameter that is used again before as many elements went by is not given back in between."""
    stage3_prefetch_bucket_size: int = 50_000_000


ZERO_SETTINGS = ZeroSettings()


def _shares(numels: list[int], stage: Stage, gpus: int) -> int:
    """Elements of a parameter group that a rank holds of what is sharded, with DeepSpeed's padding."""
    total = sum(numels)
    if stage == "torch":
        return -(-total // 16) * 16  # one flat buffer (fastjepa.optim.groups.flatten_groups)
    if stage == 0:
        return total
    if stage == 3:
        return sum(-(-numel // gpus) for numel in numels)  # parameter by parameter
    return -(-total // (2 * gpus)) * 2  # one flat buffer, aligned to two elements a rank


@dataclass(frozen=True)
class State:
    """Bytes on one rank."""

    weights: int
    """Model weights as the forward pass reads them, target encoder included."""
    gradients: int
    """While they are summed up over micro batches."""
    masters: int
    """fp32 weights, where the model's own are bf16."""
    ema: int
    """fp32 average, where it is not the target encoder's weights themselves."""
    moments: int
    buckets: int
    """Buffers that DeepSpeed keeps for sending gradients."""
    passing: int
    """At the worst moment of a step: gathered weights, copies of autocast, fp32 gradients of a group at its update."""

    @property
    def resident(self) -> int:
        return self.weights + self.gradients + self.masters + self.ema + self.moments + self.buckets

    @property
    def peak(self) -> int:
        return self.resident + self.passing


def state_bytes(
    config: Config, stage: Stage, gpus: int, *, bf16: bool = True, zero: ZeroSettings = ZERO_SETTINGS
) -> State:
    """State of one rank (the largest share) between two micro batches of a step, and what comes on top for a moment."""
    sizes = parameter_sizes(config)
    held = {group: _shares(numels, stage, gpus) for group, numels in sizes.items()}
    all_held = sum(held.values())
    targets = held["target_decay"] + held["target_no_decay"]
    trained = all_held - targets
    copies = BF16 if bf16 else 0
    if stage in ("torch", 0):
        # Stage 0 tells DeepSpeed that the target needs no gradient, and autocast keeps no copies of such weights.
        passing = copies * (all_held if stage == "torch" else trained)
        if stage == 0 and gpus > 1:
            passing += FP32 * min(trained, zero.reduce_bucket_size_stage0)
        return State(FP32 * all_held, FP32 * trained, 0, 0, 2 * FP32 * trained, 0, passing)
    low = BF16 if bf16 else FP32
    at_update = FP32 * max(held.values())  # one group at a time, in fp32
    if stage == 3:
        persistent = live = 0
        if gpus > 1:  # alone, a rank computes with its shares, which are whole
            persistent = sum(
                n for numels in sizes.values() for n in numels if n <= zero.stage3_param_persistence_threshold
            )
            whole = sum(map(sum, sizes.values()))
            live = min(_kept(config, zero) + zero.stage3_prefetch_bucket_size, whole) - persistent
        weights = low * (all_held + persistent)
        gradients = low * all_held
        buckets, passing = low * zero.reduce_bucket_size, max(low * live, at_update)
    else:
        weights = low * gpus * all_held  # whole, with the padding
        buckets, passing = 2 * low * zero.reduce_bucket_size, at_update
        if stage == 1:
            gradients = low * sum(count_parameters(config))
        else:
            gradients = low * _whole_parameters(sizes, gpus)
            buckets, passing = 0, max(buckets, at_update)  # held during a backward pass only
    return State(weights, gradients, FP32 * trained, FP32 * targets, 2 * FP32 * trained, buckets, passing)


def _whole_parameters(sizes: dict[str, list[int]], gpus: int) -> int:
    """Elements of gradients that a rank holds at stage 2; the largest of the ranks.

    A parameter of which a rank's share holds a part is kept whole. For the target's, whose gradients never come, there are
    a place and zeros.
    """
    held = [0] * gpus
    for group, numels in sizes.items():
        share, start = _shares(numels, 2, gpus), 0
        for numel in numels:
            for rank in range(start // share, (start + numel - 1) // share + 1):
                held[rank] += numel * (2 if group.startswith("target") else 1)
            start += numel
    return max(held)


def _kept(config: Config, zero: ZeroSettings) -> int:
    """Elements of context encoder and predictor that stage 3 keeps whole from their forward pass to their backward pass.

    Whoever is used last is used again first: between the two uses of a parameter, those behind it go by twice.
    """
    return min(sum(count_parameters(config)), zero.stage3_max_reuse_distance // 2)


class Traffic(NamedTuple):
    """Bytes that one rank sends in an optimizer step, by rings: an all-reduce of n bytes sends 2 (N-1)/N n, an all-gather
    or a reduce-scatter (N-1)/N n."""

    gradients: float
    weights: float
    """All-gathers, the target encoder's included."""

    @property
    def total(self) -> float:
        return self.gradients + self.weights


def bytes_sent(
    config: Config, stage: Stage, gpus: int, accum: int, *, bf16: bool = True, zero: ZeroSettings = ZERO_SETTINGS
) -> Traffic:
    """What DeepSpeed sends with our settings; some bytes of norms and flags are left out.

    Stages 1 and 2 all-reduce whole gradient buckets (a rank keeps its share of the result), stage 2 and 3 after every micro
    batch. Stage 3 gathers small parameters once a step, and large ones as they are used: the target encoder's and most of
    the others once per micro batch, those that are given back before their backward pass twice.
    """
    sizes = parameter_sizes(config)
    ring = (gpus - 1) / gpus
    encoder, predictor = count_parameters(config)
    trained = encoder + predictor
    if stage == "torch":
        padded = sum(_shares(sizes[g], stage, gpus) for g in sizes if not g.startswith("target"))
        return Traffic(2 * ring * FP32 * padded, 0.0)
    if stage == 0:
        return Traffic(2 * ring * FP32 * trained, 0.0)
    low = BF16 if bf16 else FP32
    if stage in (1, 2):
        reduced = trained * (accum if stage == 2 else 1)
        gathered = gpus * sum(_shares(numels, stage, gpus) for numels in sizes.values())
        return Traffic(2 * ring * low * reduced, ring * low * gathered)
    large = {g: [n for n in numels if n > zero.stage3_param_persistence_threshold] for g, numels in sizes.items()}
    small = {g: [n for n in numels if n <= zero.stage3_param_persistence_threshold] for g, numels in sizes.items()}
    padded_small, padded_large, padded_all = (
        gpus * sum(_shares(numels, 3, gpus) for numels in part.values()) for part in (small, large, sizes)
    )
    again = max(0, sum(sum(n) for g, n in large.items() if not g.startswith("target")) - _kept(config, zero))
    padded_target = gpus * (_shares(sizes["target_decay"], 3, gpus) + _shares(sizes["target_no_decay"], 3, gpus))
    return Traffic(
        ring * low * accum * (padded_all - padded_target), ring * low * (padded_small + accum * (padded_large + again))
    )


def waited_collectives(config: Config, stage: Stage) -> int:
    """Collectives that a step waits for one after the other, however little they send.

    Norms of the parameter groups, and weights of the context encoder's; at stage 3 every small parameter, which DeepSpeed
    gathers by itself.
    """
    sizes, zero = parameter_sizes(config), ZERO_SETTINGS
    if stage == "torch":
        return sum(not group.startswith("target") for group in sizes)
    if stage == 0:
        return -(-sum(count_parameters(config)) // zero.reduce_bucket_size_stage0)
    if stage == 3:
        small = (n <= zero.stage3_param_persistence_threshold for numels in sizes.values() for n in numels)
        return len(sizes) + sum(small)
    return len(sizes) + 2


def largest_micro_batch(per_image: float, free: float, share: int) -> int:
    """The largest divisor of a rank's share of the global batch whose activations fit; 0: not even one image."""
    fitting = [d for d in range(1, share + 1) if share % d == 0 and d * per_image <= free]
    return max(fitting, default=0)
