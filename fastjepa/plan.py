"""Which stage, how many GPUs, what micro batch: python -m fastjepa.plan --model vit_huge --gpus 64 --memory 80

Reckons state, activations, bytes sent and arithmetic of a run (fastjepa.costs), and from them the largest micro batch that
fits and the images/s that a roofline allows, for plain PyTorch and every ZeRO stage. Nothing is measured here: the figures
are bounds under the assumptions that are printed with them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastjepa import costs
from fastjepa.config import MODEL_SIZES, Config
from fastjepa.config_file import load_config
from fastjepa.costs import STAGES, Stage
from fastjepa.errors import ConfigError, FastjepaError
from fastjepa.shipped_configs import find_config

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """From the vendor's data sheets."""

    name: str
    flops: float
    """Dense bf16, per second."""
    memory_bandwidth: float
    """Bytes per second."""
    nvlink: float
    """Bytes per second, in one direction."""


DEVICES = {
    "a100": Device("A100 80 GB SXM", 312e12, 2.0e12, 300e9),
    "h100": Device("H100 SXM", 989e12, 3.35e12, 450e9),
}


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
    state = costs.state_bytes(config, stage, gpus).peak
    per_image = costs.activation_bytes(config, heaviest, stage)
    micro = costs.largest_micro_batch(per_image, cluster.usable - state, share)
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
    traffic = costs.bytes_sent(config, stage, gpus, accum, bf16=bf16)
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
    return traffic.total, exposed + latency * costs.waited_collectives(config, stage) * (gpus > 1)


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


def start_command(plan: Plan, cluster: Cluster, config_file: str | None, overrides: list[str]) -> str:
    each, nodes = min(cluster.gpus, cluster.gpus_per_node), cluster.nodes
    if plan.stage != "torch":
        where = f"--num_gpus {each}" if nodes == 1 else "--hostfile HOSTS"  # which lists the GPUs of each
        start = f"deepspeed {where} fastjepa/train.py --ds_config configs/zero{plan.stage}.json"
    elif cluster.gpus > 1:
        start = f"torchrun --nproc_per_node {each}{f' --nnodes {nodes}' * (nodes > 1)} fastjepa/train.py"
    else:
        start = "python fastjepa/train.py"
    return " ".join([start, f"--config {config_file or 'RUN.yaml'}", *overrides, f"micro_batch_size={plan.micro}"])


def format_table(plans: Sequence[Plan]) -> str:
    columns = f"{'':<13}{'state':>12}{'per image':>12}{'micro batch':>13}{'accum':>7}"
    lines = [columns + f"{'sent / step':>13}{'step':>10}{'images/s':>10}"]
    for p in plans:
        head = f"{p.name:<13}{p.state / GIB:>8.1f} GiB{p.activations_per_image / 2**20:>8.0f} MiB"
        if not p.micro:
            lines.append(f"{head}{'does not fit':>13}")
            continue
        lines.append(
            f"{head}{p.micro:>13,}{p.accum:>7}{p.sent / 1e9:>10.2f} GB"
            f"{1e3 * p.step_seconds:>7,.0f} ms{p.images_per_second:>10,.0f}"
        )
    return "\n".join(lines)


# The models of the table: the paper's, at 224 x 224.
TABLE_MODELS = (("vit_small", 16), ("vit_base", 16), ("vit_large", 16), ("vit_huge", 14), ("vit_giant", 16))
TABLE_GPUS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


def markdown_table(device: str) -> str:
    """The recommendation for every model and number of GPUs, at the official global batch."""
    lines = [
        "| model | GPUs | stage | micro batch x accum | state | activations | sent / step | step | images/s | of linear |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for model, patch_size in TABLE_MODELS:
        config = load_config(None, [f"model.name={model}", f"model.patch_size={patch_size}"])
        alone = 0.0
        for gpus in TABLE_GPUS:
            cluster = Cluster(device=DEVICES[device], gpus=gpus)
            chosen = recommend([plan_stage(config, cluster, stage) for stage in STAGES])
            assert chosen, "80 GiB hold any of them"
            p = chosen[0]
            alone = alone or p.images_per_second / gpus
            lines.append(
                f"| {model}/{patch_size} | {gpus:,} | {p.name} | {p.micro} x {p.accum} | {p.state / GIB:.1f} GiB "
                f"| {p.micro * p.activations_per_image / GIB:.1f} GiB | {p.sent / 1e9:.2f} GB "
                f"| {1e3 * p.step_seconds:,.0f} ms | {p.images_per_second:,.0f} "
                f"| {p.images_per_second / gpus / alone:.0%} |"
            )
    return "\n".join(lines)


def write_tables(path: Path) -> None:
    """Replace what lies between the marks of each device in a Markdown file.

    Raises:
        ConfigError: the file cannot be read or written, or lacks the marks.
    """
    try:
        text = path.read_text(encoding="utf-8")
        for device in DEVICES:
            begin, end = f"<!-- table {device} -->", f"<!-- end {device} -->"
            before, found, rest = text.partition(begin)
            _, closed, after = rest.partition(end)
            if not (found and closed):
                raise ConfigError(f"--table {path}: expected the lines {begin} and {end}, between which the table goes")
            text = f"{before}{begin}\n{markdown_table(device)}\n{end}{after}"
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--table {path}: {error.strerror}") from error


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m fastjepa.plan", description="Which ZeRO stage and micro batch for a model on a number of GPUs."
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings, as for fastjepa/train.py")
    parser.add_argument(
        "--config", help="YAML file of a run, or a shipped one by name (default: the official settings)"
    )
    parser.add_argument("--model", choices=sorted(MODEL_SIZES), help="short for model.name=...")
    parser.add_argument("--patch_size", help="short for model.patch_size=...")
    parser.add_argument("--gpus", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--device", choices=sorted(DEVICES), default="h100", help="default: %(default)s")
    parser.add_argument("--memory", type=float, default=80, help="GiB per GPU (default: %(default)s)")
    parser.add_argument("--gpus_per_node", type=int, default=8, help="default: %(default)s")
    parser.add_argument(
        "--network", type=float, default=400, help="Gbit/s per GPU between nodes (default: %(default)s)"
    )
    parser.add_argument(
        "--utilisation", type=float, default=0.5, help="share of the peak that is reached (default: %(default)s)"
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write plans and assumptions there too")
    parser.add_argument(
        "--table", metavar="FILE", type=Path, help="write the tables of docs/plan.md anew, and nothing else"
    )
    return parser.parse_intermixed_args(argv)


def run(args: argparse.Namespace) -> int:
    short = {"model.name": args.model, "model.patch_size": args.patch_size}
    overrides = [*(f"{key}={value}" for key, value in short.items() if value is not None), *args.overrides]
    config = load_config(None if args.config is None else find_config(args.config), overrides)
    cluster = Cluster(
        device=DEVICES[args.device], gpus=args.gpus, memory=args.memory, gpus_per_node=args.gpus_per_node,
        network=args.network, utilisation=args.utilisation,
    )  # fmt: skip
    plans = [plan_stage(config, cluster, stage) for stage in STAGES]
    notes = assumptions(config, cluster)
    chosen = recommend(plans)
    print(f"{config.model.name}/{config.model.patch_size} on {cluster.gpus} x {cluster.device.name}, "
          f"{cluster.memory:g} GiB, global batch {config.global_batch_size}: upper bounds, not promises.")  # fmt: skip
    print("images/s are those of all GPUs together, all else is per GPU; sizes are those of the heaviest moment\n")
    print(format_table(plans))
    print("\nassumed:\n" + "\n".join(f"  - {note}" for note in notes))
    command = None
    if chosen:
        plan, reason = chosen
        command = start_command(plan, cluster, args.config, overrides)
        print(f"\n{plan.name}, micro batch {plan.micro}: {reason}\n\n  {command}")
        if not args.config:
            print("\nRUN.yaml: a file with your data.source, and what else is to differ from the official settings")
    if args.json:
        report: dict[str, Any] = {
            "plans": [dataclasses.asdict(plan) for plan in plans],
            "recommended": chosen[0].stage if chosen else None,
            "command": command,
            "assumptions": notes,
        }
        try:
            args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--json {args.json}: cannot be written ({error.strerror})") from error
    if chosen:
        return 0
    fitting = remedies(config, cluster)
    least = min(plans, key=lambda plan: plan.state + plan.activations_per_image)
    raise ConfigError(
        f"{config.model.name} does not fit {count(cluster.gpus, 'GPU')} with {cluster.memory:g} GiB: {least.name} needs "
        f"{least.state / GIB:.1f} GiB of state and {least.activations_per_image / GIB:.1f} GiB for one image, "
        f"{cluster.usable / GIB:.1f} GiB are usable. "
        + (
            f"What would fit: {'; '.join(fitting)}"
            if fitting
            else "Use a smaller model, larger patches or smaller images"
        )
    )


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        if args.table:
            write_tables(args.table)
            return 0
        return run(args)
    except FastjepaError as error:
        print(f"fastjepa: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a word
    sys.exit(main())
