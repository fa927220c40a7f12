"""Reading a DeepSpeed JSON: every "auto" filled in from the run's configuration, contradictions and traps refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastjepa.config import Config
from fastjepa.config.batch_sizes import BatchSizes
from fastjepa.errors import ConfigError

# Stage 3: one sub group per parameter group, so that the partitions of the target and of its source coincide.
ZERO_SUB_GROUP_SIZE = 10**12

# DeepSpeed ignores a key that it does not know: a misspelt "zero_optimization" would silently train without ZeRO.
KNOWN = {
    "bf16",
    "comms_logger",
    "communication_data_type",
    "flops_profiler",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "gradient_predivide_factor",
    "prescale_gradients",
    "steps_per_print",
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "wall_clock_breakdown",
    "zero_allow_untested_optimizer",
    "zero_optimization",
}

# What DeepSpeed knows but fastjepa cannot train with, and why.
REFUSED = {
    "optimizer": "fastjepa brings its own optimizer, which carries the EMA",
    "scheduler": "fastjepa sets the learning rate itself",
    "fp16": "fastjepa trains in bf16 or fp32 (precision in the run's configuration)",
    "zero_optimization.round_robin_gradients": "it moves parameters between ranks, away from their EMA",
    "zero_optimization.offload_optimizer": "the fused AdamW and EMA step runs where the weights are",
    "zero_optimization.offload_param": "the fused AdamW and EMA step runs where the weights are",
    "zero_optimization.cpu_offload": "the fused AdamW and EMA step runs where the weights are",
    "zero_optimization.zero_hpz_partition_size": "checkpoints know plain sharding only",
    "zero_optimization.mics_shard_size": "checkpoints know plain sharding only",
    "bf16.bf16_optimizer_states": "an EMA in bf16 loses its updates",
    "bf16.bf16_master_weights_and_grads": "an EMA in bf16 loses its updates",
}


def read_ds_config(
    path: str | Path, config: Config, sizes: BatchSizes, world_size: int, *, bf16: bool
) -> dict[str, Any]:
    """Read a DeepSpeed JSON and fill in every "auto" from the run's configuration.

    Raises:
        ConfigError: the file is missing or not a JSON object, holds a key that DeepSpeed would ignore or that breaks the
            EMA, or contradicts the run's configuration. The message names file, key and both values.
    """
    try:
        settings = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot read this DeepSpeed configuration: {error}") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"{path}: expected a JSON object, got {type(settings).__name__}")
    for section in ("zero_optimization", "bf16"):
        if not isinstance(settings.setdefault(section, {}), dict):
            raise ConfigError(f"{path}: {section} = {settings[section]!r}: expected a JSON object")
    for key, reason in REFUSED.items():
        holder, name = _locate(settings, key)
        value = holder.get(name)
        off = isinstance(value, dict) and (value.get("enabled") is False or value.get("device") == "none")
        if value and not off:
            raise ConfigError(f"{path}: {key} is not supported: {reason}. Remove the key")
    unknown = sorted(settings.keys() - KNOWN - REFUSED.keys())
    if unknown:
        raise ConfigError(f"{path}: keys {unknown} are unknown or not supported by fastjepa. Known: {sorted(KNOWN)}")

    stage = settings["zero_optimization"].setdefault("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise ConfigError(f"{path}: zero_optimization.stage = {stage!r}: expected 0, 1, 2 or 3")
    if stage == 3:
        settings["zero_optimization"].setdefault("sub_group_size", ZERO_SUB_GROUP_SIZE)
    ours: dict[str, tuple[Any, str]] = {
        "train_batch_size": (config.global_batch_size, "global_batch_size"),
        "train_micro_batch_size_per_gpu": (sizes.micro, "micro_batch_size"),
        "gradient_accumulation_steps": (sizes.accum, f"global_batch_size / (micro_batch_size * {world_size} ranks)"),
        "gradient_clipping": (config.optim.clip_grad or 0.0, "optim.clip_grad"),
        # Not at stage 0, where DeepSpeed takes an optimizer step of its own for bf16. Autocast over fp32 weights serves.
        "bf16.enabled": (
            bf16 and stage > 0,
            "precision" if stage else "precision (at stage 0: autocast over fp32 weights)",
        ),
        "zero_allow_untested_optimizer": (True, "the optimizer that fastjepa brings, which needs it"),
        "bf16.check_grad_overflow": (False, "the check that fastjepa makes itself, without waiting for the GPU"),
    }
    if stage in (1, 2):
        norm = (False, "the gradient norm that fastjepa computes itself, without waiting for the GPU")
        ours["zero_optimization.compute_grad_norm"] = norm
    for key, (value, source) in ours.items():
        holder, name = _locate(settings, key)
        theirs = holder.get(name, "auto")
        if theirs not in ("auto", value):
            raise ConfigError(
                f'{path}: {key} = {theirs!r} contradicts {source} = {value!r} of the run: make them equal, or write "auto"'
            )
        holder[name] = value
    settings["gradient_clipping"] = 0.0  # the optimizer clips: it has the norm on the device
    settings["timers"] = {"throughput": {"enabled": False}}  # else each micro batch waits for the GPU twice
    return settings


def _locate(settings: dict[str, Any], key: str) -> tuple[dict[str, Any], str]:
    section, _, name = key.partition(".")
    return (settings[section], name) if name else (settings, key)
