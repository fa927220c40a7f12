"""The whole step against plain torch: 50 steps of weights and EMA, by every engine, on one and two ranks."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastjepa.batch_sizes import BatchSizes
from fastjepa.config import Config, OptimConfig
from fastjepa.engine import Engine, build_engine
from fastjepa.objective import build_model
from fastjepa.optim import Schedule, set_schedule
from tests.small import small_batch, small_config

STEPS = 50
CPU = torch.device("cpu")


def trajectory_config(*, clip_grad: float | None = None, micro: int | None = None, **changes: Any) -> Config:
    optim = OptimConfig(warmup_epochs=1, lr=3e-3, ema_momentum=(0.9, 1.0), clip_grad=clip_grad)
    return small_config(optim=optim, micro_batch_size=micro, **changes)


def schedule(config: Config) -> Schedule:
    return Schedule(config.optim, steps_per_epoch=10, total_steps=STEPS)


def plain_trajectory(config: Config, steps: int = STEPS) -> dict[str, Tensor]:
    """torch.optim.AdamW, an average by loop, one process, whole batches, fp32."""
    model = build_model(config)
    model.target_encoder.requires_grad_(False)
    decayed = [p for p in model.trained_parameters() if p.ndim > 1]
    others = [p for p in model.trained_parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed}, {"params": others}], betas=config.optim.betas, eps=config.optim.eps
    )
    for step in range(steps):
        values = schedule(config).at(step)
        for group, decay in zip(optimizer.param_groups, (values["weight_decay"], 0.0), strict=True):
            group["lr"], group["weight_decay"] = values["lr"], decay
        model(*small_batch(config, config.global_batch_size, step=step)).backward()
        if config.optim.clip_grad:
            torch.nn.utils.clip_grad_norm_(model.trained_parameters(), config.optim.clip_grad)
        optimizer.step()
        optimizer.zero_grad()
        momentum = values["ema_momentum"]
        with torch.no_grad():
            for average, weight in zip(
                model.target_encoder.parameters(), model.context_encoder.parameters(), strict=True
            ):
                average.copy_(momentum * average + (1 - momentum) * weight)
    return {name: p.detach() for name, p in model.named_parameters()}


def engine_steps(
    engine: Engine, config: Config, sizes: BatchSizes, rank: int, world: int, first: int, last: int
) -> None:
    """The same batches, shared out over micro batches and ranks."""
    for step in range(first, last):
        set_schedule(engine.param_groups, schedule(config).at(step))
        for micro in range(sizes.accum):
            images, masks = _share(config, step, micro * world + rank, sizes.micro)
            engine.micro_step(images, masks)


def _share(config: Config, step: int, index: int, micro: int) -> tuple[Tensor, Any]:
    from fastjepa.masks import sample_masks

    images, _ = small_batch(config, config.global_batch_size, step=step)
    rows = torch.arange(index * micro, (index + 1) * micro)
    indices = rows + step * config.global_batch_size
    masks = sample_masks(config.masks, config.grid_h, config.grid_w, seed=1, step=step, sample_indices=indices)
    return images[rows], masks


def full_state(engine: Engine, kind: str = "weight") -> dict[str, Tensor]:
    """fp32 weights (EMA for the target encoder) or a moment, put together from this rank's pieces; one rank only."""
    state = {name: torch.full(shape, torch.nan).flatten() for name, shape in engine.parameter_shapes().items()}
    for piece in engine.pieces():
        source = piece.tensor if kind == "weight" else engine.optimizer.state[piece.tensor][kind]
        state[piece.name][piece.start : piece.start + piece.numel] = piece.view(source)
    return {name: flat.view(engine.parameter_shapes()[name]) for name, flat in state.items()}


def assert_same(mine: dict[str, Tensor], expected: dict[str, Tensor], relative: float) -> None:
    """By norm of each parameter, without the bias of the keys: it adds the same to all scores of a query, so its gradient
    is 0 but for rounding, which Adam scales up to full steps."""
    assert mine.keys() == expected.keys()
    for name, weight in expected.items():
        theirs = mine[name]
        if name.endswith("attn.qkv.bias"):
            weight, theirs = (torch.cat([x.chunk(3)[0], x.chunk(3)[2]]) for x in (weight, theirs))
        error = (theirs - weight).norm() / weight.norm()
        assert error <= relative, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize(("clip_grad", "micro"), [(None, None), (0.05, None), (None, 2)])
def test_plain_torch_follows_the_reference(clip_grad: float | None, micro: int | None) -> None:
    config = trajectory_config(clip_grad=clip_grad, micro=micro)
    sizes = BatchSizes.share(config, world_size=1)
    engine = build_engine(build_model(config), config, sizes, CPU, ds_config=None)
    engine_steps(engine, config, sizes, 0, 1, 0, STEPS)
    assert_same(full_state(engine), plain_trajectory(config), 1e-6)


def test_weights_and_their_average_move_apart() -> None:
    """Guards the comparison itself: the trajectories above are not trivially equal."""
    config = trajectory_config()
    start = {name: p.detach().clone() for name, p in build_model(config).named_parameters()}
    end = plain_trajectory(config)
    name = "blocks.0.attn.qkv.weight"
    moved = {
        part: (end[f"{part}.{name}"] - start[f"{part}.{name}"]).norm() for part in ("context_encoder", "target_encoder")
    }
    assert moved["context_encoder"] > 1.2 * moved["target_encoder"] > 0.01


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def launch(script: str, world: int, *args: str) -> None:
    """Run a module of this folder as `world` processes, as a launcher would; fails if one of them does."""
    port = str(free_port())
    processes = []
    for rank in range(world):
        env = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "OMP_NUM_THREADS": "1",
        }
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_WORLD_SIZE": str(world)}
        root = Path(__file__).parent.parent
        env["PYTHONPATH"] = os.pathsep.join([str(root), str(root / "kernels")])
        command = [sys.executable, "-m", f"tests.{script}", *args]
        processes.append(
            subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    outputs = [process.communicate(timeout=500)[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output[-4000:]


@pytest.mark.parametrize("world", [1, 2])
def test_zero_follows_the_reference(world: int, tmp_path: Path) -> None:
    """ZeRO 0, 1, 2, 3 and plain torch, all in one launch of `world` processes (start-up is what takes the time)."""
    launch("worker_trajectory", world, str(tmp_path))
    results = torch.load(tmp_path / "results.pt", weights_only=True)
    assert set(results) == {"torch", "zero0", "zero1", "zero2", "zero3", "zero2 clip accum"}
    plain = plain_trajectory(trajectory_config())
    clipped = plain_trajectory(trajectory_config(clip_grad=0.05))
    for name, state in results.items():
        tolerance = 1e-4 if name == "zero3" else 1e-6
        assert_same(state, clipped if "clip" in name else plain, tolerance)
