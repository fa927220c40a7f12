"""Plans for each ZeRO stage: the largest micro batch that fits, and the images/s that a roofline allows."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from fastjepa.config import Config
from fastjepa.errors import ConfigError
from fastjepa.host import GIB
from fastjepa.objectives.registry import method_of
from fastjepa.plan import zero
from fastjepa.plan.datasheets import Device
from fastjepa.plan.zero import STAGES, Stage


def usable_memory(total: float) -> float:
    """Bytes of a GPU's memory that a run can use. CUDA's context, NCCL's buffers and fragmentation take the rest."""
    return 0.9 * total - 1.5 * GIB


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """GPUs, the links between them, and how well a run uses them."""

    device: Device
    gpus: int
    memory: float = 80.0
    """GiB per GPU."""
    gpus_per_node: int = 8
    network: float = 400.0
    """Gbit/s per GPU between nodes, in one direction."""
    utilisation: float = 0.5
    """Share of peak FLOP/s that matrix products reach."""
    latency: float = 20e-6
    """Seconds that a collective takes at least, however little it sends."""

    def __post_init__(self) -> None:
        for key in ("gpus", "memory", "gpus_per_node", "network", "utilisation"):
            if not getattr(self, key) > 0:
                raise ConfigError(f"--{key} {getattr(self, key)}: expected a positive number")
        if self.utilisation > 1:
            raise ConfigError(f"--utilisation {self.utilisation}: expected a share of the peak, at most 1")

    @property
    def usable(self) -> float:
        """Bytes of each GPU's memory that a run can use."""
        return usable_memory(self.memory * GIB)

    @property
    def nodes(self) -> int:
        return -(-self.gpus // self.gpus_per_node)

    @property
    def link(self) -> float:
        """Bytes per second that a rank sends in a ring. Between nodes, rings use all network cards of a node in parallel."""
        if self.nodes == 1:
            return self.device.nvlink
        return min(self.device.nvlink, self.gpus_per_node * self.network * 1e9 / 8)


@dataclass(frozen=True)
class Plan:
    """The plan for one stage on a cluster. Bytes are per rank, seconds per optimizer step."""

    stage: Stage
    state: int
    """Bytes of weights, gradients and optimizer state at the heaviest moment."""
    activations_per_image: float
    """Bytes that each image of a micro batch adds."""
    micro: int = 0
    """Images in the largest micro batch. 0 if not even one image fits; all fields below are 0 then."""
    accum: int = 0
    """Micro batches per optimizer step."""
    sent: float = 0.0
    """Bytes that a rank sends in an optimizer step."""
    compute_seconds: float = 0.0
    update_seconds: float = 0.0
    exposed_seconds: float = 0.0
    """Seconds of communication that no computation hides."""
    images_per_second: float = 0.0

    @property
    def step_seconds(self) -> float:
        return self.compute_seconds + self.update_seconds + self.exposed_seconds

    @property
    def name(self) -> str:
        return "plain PyTorch" if self.stage == "torch" else f"ZeRO {self.stage}"


BYTES_WITH_AVERAGE, BYTES_WITHOUT = 38, 28
"""Bytes that AdamW reads and writes per parameter: with an EMA to update, and without."""


def memory_formula(config: Config, stage: Stage, gpus: int, *, bf16: bool = True) -> tuple[int, float]:
    """Bytes that one rank needs at the heaviest moment of a step.

    Returns:
        Bytes of state, and bytes that each image of a micro batch adds.
    """
    method = method_of(config)
    _, heaviest = method.typical_tokens()
    autocast = bf16 and stage in ("torch", 0)
    per_image = method.activation_bytes(heaviest, bf16=bf16, autocast=autocast)
    return zero.state_bytes(config, stage, gpus, bf16=bf16).peak, per_image


def plan_stage(config: Config, cluster: Cluster, stage: Stage) -> Plan:
    """Plan one stage: find the largest micro batch that fits, and estimate the time of a step with it.

    Raises:
        ConfigError: the global batch cannot be shared out over the GPUs.
    """
    gpus, device = cluster.gpus, cluster.device
    if config.global_batch_size % gpus:
        raise ConfigError(f"global_batch_size = {config.global_batch_size}: expected a multiple of --gpus {gpus}")
    share = config.global_batch_size // gpus
    state, per_image = memory_formula(config, stage, gpus)
    micro = zero.largest_micro_batch(per_image, cluster.usable - state, share)
    if not micro:
        return Plan(stage, state, per_image)
    accum = share // micro
    flops_per_second = device.flops * cluster.utilisation
    method, parameters = method_of(config), zero.parameters_of(config)
    mean, _ = method.typical_tokens()
    compute = share * method.step_flops(mean) / flops_per_second
    shards = 1 if stage in ("torch", 0) else gpus
    without_average = parameters.trained - parameters.averaged
    bytes_touched = BYTES_WITH_AVERAGE * parameters.averaged + BYTES_WITHOUT * without_average
    update = bytes_touched / shards / device.memory_bandwidth
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
    """Bytes that a rank sends in a step, and the seconds of sending that no computation hides.

    Args:
        compute: seconds that a rank computes in a step.
        link: bytes per second at which it sends.
        latency: seconds that the smallest collective takes.
    """
    method, parameters = method_of(config), zero.parameters_of(config)
    mean, _ = method.typical_tokens()
    traffic = zero.bytes_sent(config, stage, gpus, accum, bf16=bf16)
    gradients, weights = traffic.gradients / link, traffic.weights / link
    if stage == 3:
        exposed = max(0.0, gradients + weights - compute)
    elif stage in (1, 2):
        backward = 0.6 * compute / (accum if stage == 1 else 1)
        first_part = compute / accum * method.first_part_flops(mean) / method.step_flops(mean)
        first_weights = weights * next(iter(parameters.parts.values())) / parameters.total
        late = max(0.0, weights - first_weights - first_part)
        exposed = max(0.0, gradients - backward) + first_weights + late
    else:
        exposed = gradients
    return traffic.total, exposed + latency * zero.waited_collectives(config, stage) * (gpus > 1)


COMMUNICATION = (
    "plain PyTorch and ZeRO 0 send gradients after the backward pass, ZeRO 1 during the last backward pass of a step, "
    "ZeRO 2 and 3 during each; at ZeRO 1 and 2 the first network waits for its new weights, and those of the others are "
    "sent during its forward pass; ZeRO 3 gathers weights during the step"
)
"""The overlap of communication and computation that `communication` assumes, in words."""


def recommend(plans: Sequence[Plan]) -> tuple[Plan, str] | None:
    """Choose the fastest stage that fits; among stages within 0.1 % of it, the simplest.

    Returns:
        The plan and the reason for it, or None if no stage fits.
    """
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
        reasons.append(f"{', '.join(slower)} would be slower by these bounds")
    if len(feasible) > 1 and chosen is not feasible[-1]:
        reasons.append("higher stages save memory that is not needed")
    return chosen, "; ".join(reasons) or "nothing else fits"


def remedies(config: Config, cluster: Cluster) -> list[str]:
    """Changes that would make a run fit which fits at no stage: fewer activations, more GPUs, or larger ones."""
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
    """The assumptions that plans rest on, as lines of text."""
    method, parameters = method_of(config), zero.parameters_of(config)
    mean, heaviest = (tokens._asdict() for tokens in method.typical_tokens())
    flops = method.step_flops(method.typical_tokens()[0])
    device = cluster.device
    sending = [
        f"{count(cluster.nodes, 'node')} of up to {count(cluster.gpus_per_node, 'GPU')}; a ring sends "
        f"{cluster.link / 1e9:.0f} GB/s (NVLink {device.nvlink / 1e9:.0f} GB/s each way, network {cluster.network:.0f} "
        f"Gbit/s per GPU); a collective that a step waits for takes at least {1e6 * cluster.latency:.0f} us",
        COMMUNICATION,
    ]
    return [
        f"{config.model.name}/{config.model.patch_size} at {'x'.join(map(str, config.data.image_hw))}: "
        + ", ".join(f"{name.replace('_', ' ')} {n / 1e6:.0f} M" for name, n in parameters.parts.items())
        + f" parameters; objective {config.objective.name}",
        "tokens per image: "
        + ", ".join(f"{name} {number:.0f}" for name, number in mean.items() if "_" not in name)
        + "; memory is that of the heaviest of 64 steps: "
        + ", ".join(f"{name} {number:.0f}" for name, number in heaviest.items() if "_" not in name),
        f"{flops / 1e9:.0f} GFLOP per image and step"
        + (", recomputation included" if config.model.activation_checkpointing else ""),
        f"{device.name}: {device.flops / 1e12:.0f} TFLOP/s bf16 dense, of which a run reaches {cluster.utilisation:.0%} "
        f"(assumed, not measured); {device.memory_bandwidth / 1e12:.2f} TB/s of memory bandwidth",
        *sending * (cluster.gpus > 1),
        f"AdamW reads and writes {BYTES_WITH_AVERAGE} B per parameter with an EMA, {BYTES_WITHOUT} B per other parameter",
        f"a run can use {cluster.usable / GIB:.1f} of {cluster.memory:g} GiB",
        "no step waits for data",
    ]
