"""The plan of a run: the largest micro batch that fits and the images/s that a roofline allows, for each ZeRO stage."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from fastjepa.config import Config
from fastjepa.errors import ConfigError
from fastjepa.objectives.ijepa import costs
from fastjepa.objectives.ijepa.costs import STAGES, Stage
from fastjepa.plan import zero
from fastjepa.plan.datasheets import Device

GIB = 2**30


def usable_memory(total: float) -> float:
    """Bytes of a GPU's. The rest is CUDA's context, NCCL's buffers and what the allocator cannot use."""
    return 0.9 * total - 1.5 * GIB


@dataclass(frozen=True, kw_only=True)
class Cluster:
    device: Device
    gpus: int
    memory: float = 80.0
    """GiB per GPU."""
    gpus_per_node: int = 8
    network: float = 400.0
    """Gbit/s per GPU between nodes, in one direction."""
    utilisation: float = 0.5
    """Share of the peak that matrix products reach."""
    latency: float = 20e-6
    """Seconds that a collective takes however small it is."""

    def __post_init__(self) -> None:
        for key in ("gpus", "memory", "gpus_per_node", "network", "utilisation"):
            if not getattr(self, key) > 0:
                raise ConfigError(f"--{key} {getattr(self, key)}: expected a positive number")
        if self.utilisation > 1:
            raise ConfigError(f"--utilisation {self.utilisation}: expected a share of the peak, at most 1")

    @property
    def usable(self) -> float:
        """Bytes."""
        return usable_memory(self.memory * GIB)

    @property
    def nodes(self) -> int:
        return -(-self.gpus // self.gpus_per_node)

    @property
    def link(self) -> float:
        """Bytes per second at which a rank sends in a ring. Between nodes, rings run through all of a node's network cards
        side by side."""
        if self.nodes == 1:
            return self.device.nvlink
        return min(self.device.nvlink, self.gpus_per_node * self.network * 1e9 / 8)


@dataclass(frozen=True)
class Plan:
    """One stage on a cluster. Bytes per rank, seconds per optimizer step."""

    stage: Stage
    state: int
    activations_per_image: float
    micro: int = 0
    """0: does not fit, and the rest is 0 too."""
    accum: int = 0
    sent: float = 0.0
    compute_seconds: float = 0.0
    update_seconds: float = 0.0
    exposed_seconds: float = 0.0
    """Of communication, behind nothing."""
    images_per_second: float = 0.0

    @property
    def step_seconds(self) -> float:
        return self.compute_seconds + self.update_seconds + self.exposed_seconds

    @property
    def name(self) -> str:
        return "plain PyTorch" if self.stage == "torch" else f"ZeRO {self.stage}"


def plan_stage(config: Config, cluster: Cluster, stage: Stage) -> Plan:
    """The largest micro batch that fits, and the time of a step with it.

    Raises:
        ConfigError: the global batch cannot be shared out over the GPUs.
    """
    gpus, device = cluster.gpus, cluster.device
    if config.global_batch_size % gpus:
        raise ConfigError(f"global_batch_size = {config.global_batch_size}: expected a multiple of --gpus {gpus}")
    share = config.global_batch_size // gpus
    mean, heaviest = costs.sample_tokens(config.masks, config.grid_h, config.grid_w)
    state = zero.state_bytes(config, stage, gpus).peak
    per_image = costs.activation_bytes(config, heaviest, stage)
    micro = zero.largest_micro_batch(per_image, cluster.usable - state, share)
    if not micro:
        return Plan(stage, state, per_image)
    accum = share // micro
    reached = device.flops * cluster.utilisation
    compute = share * costs.flops_per_image(config, mean) / reached
    encoder, predictor = costs.count_parameters(config)
    held = 1 if stage in ("torch", 0) else gpus
    update = (38 * encoder + 28 * predictor) / held / device.memory_bandwidth
    sent, exposed = communication(
        config, stage, gpus, accum, compute=compute, link=cluster.link, latency=cluster.latency
    )
    speed = config.global_batch_size / (compute + update + exposed)
    return Plan(stage, state, per_image, micro, accum, sent, compute, update, exposed, speed)


def communication(
    config: Config,
    stage: Stage,
    gpus: int,
    accum: int,
    *,
    compute: float,
    link: float,
    latency: float,
    bf16: bool = True,
) -> tuple[float, float]:
    """Bytes that a rank sends in a step, and the seconds of it that are behind nothing.

    Args:
        compute: seconds that a rank computes in a step.
        link: bytes per second at which it sends.
        latency: seconds that a collective takes however small it is.
    """
    mean, _ = costs.sample_tokens(config.masks, config.grid_h, config.grid_w)
    encoder, predictor = costs.count_parameters(config)
    traffic = zero.bytes_sent(config, stage, gpus, accum, bf16=bf16)
    gradients, weights = traffic.gradients / link, traffic.weights / link
    if stage == 3:
        exposed = max(0.0, gradients + weights - compute)
    elif stage in (1, 2):
        backward = 0.6 * compute / (accum if stage == 1 else 1)
        context = compute / accum * costs.forward_flops(config, mean).context / costs.flops_per_image(config, mean)
        first = weights * encoder / (2 * encoder + predictor)
        exposed = max(0.0, gradients - backward) + first + max(0.0, weights - first - context)
    else:
        exposed = gradients
    return traffic.total, exposed + latency * zero.waited_collectives(config, stage) * (gpus > 1)


# What `communication` takes to be hidden.
COMMUNICATION = (
    "plain PyTorch and ZeRO 0 send gradients after the backward pass, ZeRO 1 during the last one of a step, ZeRO 2 and 3 "
    "during each; at ZeRO 1 and 2 the context encoder waits for its new weights, those of predictor and target encoder "
    "travel under its forward pass; ZeRO 3 gathers weights during the step"
)


def recommend(plans: Sequence[Plan]) -> tuple[Plan, str] | None:
    """The fastest stage that fits, of equally fast ones the simplest; and why. None: nothing fits."""
    feasible = [plan for plan in plans if plan.micro]
    if not feasible:
        return None
    fastest = max(feasible, key=lambda plan: plan.images_per_second)
    chosen = next(plan for plan in feasible if plan.images_per_second >= 0.999 * fastest.images_per_second)
    skipped = plans[: plans.index(chosen)]
    too_large = [plan.name for plan in skipped if not plan.micro]
    slower = [plan.name for plan in skipped if plan.micro]
    reasons = [f"{', '.join(too_large)} would not fit"] if too_large else []
    if slower:
        reasons.append(f"{', '.join(slower)} would be slower by the bound")
    if len(feasible) > 1 and chosen is not feasible[-1]:
        reasons.append("higher stages save memory that is not needed")
    return chosen, "; ".join(reasons) or "nothing else fits"


def remedies(config: Config, cluster: Cluster) -> list[str]:
    """What would fit, where nothing does."""
    found = []
    lean = dataclasses.replace(config, model=dataclasses.replace(config.model, activation_checkpointing=True))
    if _fits(lean, cluster):
        found.append("model.activation_checkpointing=true")
    gpus = cluster.gpus * 2
    while gpus <= config.global_batch_size and config.global_batch_size % gpus == 0:
        if _fits(config, dataclasses.replace(cluster, gpus=gpus)):
            found.append(count(gpus, "GPU"))
            break
        gpus *= 2
    for memory in (24, 40, 80, 141, 192):
        larger = dataclasses.replace(cluster, memory=float(memory))
        if memory > cluster.memory and _fits(config, larger):
            found.append(f"GPUs with {memory} GiB")
            break
    return found


def _fits(config: Config, cluster: Cluster) -> bool:
    return any(plan_stage(config, cluster, stage).micro for stage in STAGES)


def count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


def assumptions(config: Config, cluster: Cluster) -> list[str]:
    mean, heaviest = costs.sample_tokens(config.masks, config.grid_h, config.grid_w)
    encoder, predictor = costs.count_parameters(config)
    flops = costs.flops_per_image(config, mean)
    device = cluster.device
    sending = [
        f"{count(cluster.nodes, 'node')} of up to {count(cluster.gpus_per_node, 'GPU')}; a ring sends "
        f"{cluster.link / 1e9:.0f} GB/s (NVLink {device.nvlink / 1e9:.0f} GB/s each way, network {cluster.network:.0f} "
        f"Gbit/s per GPU); a collective that is waited for takes {1e6 * cluster.latency:.0f} us at least",
        COMMUNICATION,
    ]
    return [
        f"{config.model.name}/{config.model.patch_size} at {'x'.join(map(str, config.data.image_hw))}: encoder "
        f"{encoder / 1e6:.0f} M, predictor {predictor / 1e6:.0f} M parameters; masks.mode {config.masks.mode}",
        f"tokens per image: {mean.patches} patches, context {mean.context:.0f}, predictor {mean.predictor:.0f} "
        f"(heaviest of 64 steps: {heaviest.predictor:.0f}, which memory is reckoned with)",
        f"{flops / 1e9:.0f} GFLOP per image and step"
        + (", recomputation included" if config.model.activation_checkpointing else ""),
        f"{device.name}: {device.flops / 1e12:.0f} TFLOP/s bf16 dense, of which {cluster.utilisation:.0%} are reached "
        f"(assumed, not measured); {device.memory_bandwidth / 1e12:.2f} TB/s",
        *sending * (cluster.gpus > 1),
        f"AdamW with EMA moves 38 B per encoder parameter, 28 B per predictor parameter; usable memory "
        f"{cluster.usable / GIB:.1f} of {cluster.memory:g} GiB",
        "data loading is never waited for",
    ]
