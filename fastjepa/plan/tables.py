"""Plans as text: the table for a terminal, the tables of docs/plan.md, the command that starts a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fastjepa.errors import ConfigError
from fastjepa.host import GIB, MIB
from fastjepa.objectives.registry import load_config
from fastjepa.plan.datasheets import DEVICES
from fastjepa.plan.planner import Cluster, Plan, plan_stage, recommend
from fastjepa.plan.zero import STAGES


def start_command(plan: Plan, cluster: Cluster, config_file: str | None, overrides: list[str]) -> str:
    """The shell command that starts a run by this plan; HOSTS is the user's hostfile, RUN.yaml their configuration."""
    per_node, nodes = min(cluster.gpus, cluster.gpus_per_node), cluster.nodes
    if plan.stage != "torch":
        where = f"--num_gpus {per_node}" if nodes == 1 else "--hostfile HOSTS"  # the hostfile has the GPUs per node
        start = f"deepspeed {where} fastjepa/train.py --ds_config configs/zero{plan.stage}.json"
    elif cluster.gpus > 1:
        start = f"torchrun --nproc_per_node {per_node}{f' --nnodes {nodes}' * (nodes > 1)} fastjepa/train.py"
    else:
        start = "python fastjepa/train.py"
    return " ".join([start, f"--config {config_file or 'RUN.yaml'}", *overrides, f"micro_batch_size={plan.micro}"])


def format_table(plans: Sequence[Plan]) -> str:
    """The plans as a table for a terminal, one row per stage."""
    columns = f"{'':<13}{'state':>12}{'per image':>12}{'micro batch':>13}{'accum':>7}"
    lines = [columns + f"{'sent / step':>13}{'step':>10}{'images/s':>10}"]
    for p in plans:
        head = f"{p.name:<13}{p.state / GIB:>8.1f} GiB{p.activations_per_image / MIB:>8.0f} MiB"
        if not p.micro:
            lines.append(f"{head}{'does not fit':>13}")
            continue
        lines.append(
            f"{head}{p.micro:>13,}{p.accum:>7}{p.sent / 1e9:>10.2f} GB"
            f"{1e3 * p.step_seconds:>7,.0f} ms{p.images_per_second:>10,.0f}"
        )
    return "\n".join(lines)


# The models of the paper, at 224 x 224.
TABLE_MODELS = (("vit_small", 16), ("vit_base", 16), ("vit_large", 16), ("vit_huge", 14), ("vit_giant", 16))


TABLE_GPUS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


def markdown_table(device: str) -> str:
    """The recommended plan for every model and number of GPUs, at the official global batch, as a Markdown table."""
    lines = [
        "| model | GPUs | stage | micro batch x accum | state | activations | sent / step | step | images/s | of linear |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for model, patch_size in TABLE_MODELS:
        config = load_config(None, [f"model.name={model}", f"model.patch_size={patch_size}"])
        images_per_gpu = 0.0  # per second, on one GPU
        for gpus in TABLE_GPUS:
            cluster = Cluster(device=DEVICES[device], gpus=gpus)
            chosen = recommend([plan_stage(config, cluster, stage) for stage in STAGES])
            assert chosen, "80 GiB hold every model of the table"
            p = chosen[0]
            images_per_gpu = images_per_gpu or p.images_per_second / gpus
            lines.append(
                f"| {model}/{patch_size} | {gpus:,} | {p.name} | {p.micro} x {p.accum} | {p.state / GIB:.1f} GiB "
                f"| {p.micro * p.activations_per_image / GIB:.1f} GiB | {p.sent / 1e9:.2f} GB "
                f"| {1e3 * p.step_seconds:,.0f} ms | {p.images_per_second:,.0f} "
                f"| {p.images_per_second / gpus / images_per_gpu:.0%} |"
            )
    return "\n".join(lines)


def write_tables(path: Path) -> None:
    """Update the table of each device in a Markdown file, between `<!-- table NAME -->` and `<!-- end NAME -->`.

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
