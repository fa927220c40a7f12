"""What only a GPU can show: the step does not wait for the host, and computes what the CPU computes."""

from pathlib import Path

import pytest
import torch

from fastjepa import checkpoint
from fastjepa.batch_sizes import BatchSizes
from fastjepa.checkpoint import RunState
from fastjepa.checkpointer import Checkpointer
from fastjepa.engine import TorchEngine
from fastjepa.objective import build_model
from fastjepa.optim import Schedule, set_schedule
from tests.small import small_batch, small_config

pytestmark = pytest.mark.gpu


def _losses(device: torch.device, precision: str, steps: int, *, guarded: bool) -> list[torch.Tensor]:
    config = small_config(precision=precision)
    engine = TorchEngine(build_model(config), config, BatchSizes.share(config, 1), device)
    schedule = Schedule(config.optim, steps_per_epoch=steps, total_steps=steps)
    batches = [small_batch(config, config.global_batch_size, step=step) for step in range(steps)]
    on_device = [(images.to(device), masks.to(device)) for images, masks in batches]
    losses = []
    for step, (images, masks) in enumerate(on_device):
        set_schedule(engine.param_groups, schedule.at(step))
        if guarded and step > 0:  # the first step may wait: libraries set themselves up
            torch.cuda.set_sync_debug_mode("error")
        try:
            losses.append(engine.micro_step(images, masks))
        finally:
            if guarded:
                torch.cuda.set_sync_debug_mode("default")
    return [loss.cpu() for loss in losses]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_never_waits_for_the_host(precision: str) -> None:
    losses = _losses(torch.device("cuda"), precision, 3, guarded=True)
    assert all(loss.isfinite() for loss in losses)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 3e-2)])
def test_gpu_and_cpu_losses_agree_over_twenty_steps(precision: str, tolerance: float) -> None:
    on_gpu = _losses(torch.device("cuda"), precision, 20, guarded=False)
    on_cpu = _losses(torch.device("cpu"), "fp32", 20, guarded=False)
    torch.testing.assert_close(torch.stack(on_gpu), torch.stack(on_cpu), rtol=tolerance, atol=0)


def test_a_step_that_is_not_finite_is_skipped_without_waiting_for_the_host() -> None:
    device, config = torch.device("cuda"), small_config()
    engine = TorchEngine(build_model(config), config, BatchSizes.share(config, 1), device)
    images, masks = small_batch(config, config.global_batch_size)
    images, masks = images.to(device), masks.to(device)
    engine.micro_step(images, masks)
    before = [piece.view(piece.tensor).clone() for piece in engine.pieces()]
    torch.cuda.set_sync_debug_mode("error")
    try:
        engine.micro_step(images * torch.nan, masks)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(old, piece.view(piece.tensor)) for old, piece in zip(before, engine.pieces(), strict=True))
    assert (engine.optimizer.updates, int(engine.skipped_in_a_row())) == (1, 1)


def test_a_background_save_holds_the_state_of_its_moment_and_a_cpu_reads_it(tmp_path: Path) -> None:
    device, config = torch.device("cuda"), small_config()
    sizes = BatchSizes.share(config, 1)
    on_gpu = TorchEngine(build_model(config), config, sizes, device)
    images, masks = small_batch(config, config.global_batch_size)
    images, masks = images.to(device), masks.to(device)
    on_gpu.micro_step(images, masks)
    expected = [tensor.cpu() for tensor in _state(on_gpu)]
    with Checkpointer(tmp_path, keep_last=1, keep_every=None, asynchronous=True) as saves:
        saves.save(on_gpu, RunState(1, {}, {}), last=False)
        for _ in range(3):
            on_gpu.micro_step(images, masks)
    assert not torch.equal(_state(on_gpu)[0].cpu(), expected[0])
    on_cpu = TorchEngine(build_model(config), config, sizes, torch.device("cpu"))
    checkpoint.load(tmp_path / "step_00000001", on_cpu)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(_state(on_cpu), expected, strict=True))


def _state(engine: TorchEngine) -> list[torch.Tensor]:
    """Weights, EMA and moments of every parameter, in the optimizer's memory."""
    return [
        piece.view(tensor)
        for piece in engine.pieces()
        for tensor in (piece.tensor, *engine.optimizer.moments(piece.tensor).values())
    ]
