"""The promises of every engine in one process, on the CPU or on the GPU: DeepSpeed uses one of the two per process."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastjepa_kernels
from benchmarks.launch import ROOT
from fastjepa import distributed
from fastjepa.checkpoint import restore
from fastjepa.checkpoint.checkpointer import Checkpointer
from fastjepa.checkpoint.format import RunState
from fastjepa.checkpoint.writer import Snapshot
from fastjepa.config import KernelsConfig, OptimConfig
from fastjepa.config.batch_sizes import BatchSizes
from fastjepa.engine.base import Engine
from fastjepa.engine.compilation import compile_blocks
from fastjepa.engine.deepspeed_engine import DeepSpeedEngine
from fastjepa.engine.torch_engine import TorchEngine
from fastjepa.errors import ConfigError
from fastjepa.objectives.ijepa.block_sizes import MaskConfig
from fastjepa.objectives.ijepa.objective import MaskedImages
from fastjepa.optim.schedule import Schedule, set_schedule
from tests.support.read_backs import ReadBacks
from tests.support.small import config_of, engine_of, small_batch, small_config

CONFIGS = ROOT / "configs"
CPU = pytest.param(
    torch.device("cpu"),
    marks=pytest.mark.skipif(torch.cuda.is_available(), reason="DeepSpeed is on the GPU here"),
    id="cpu",
)
GPU = pytest.param(torch.device("cuda"), marks=pytest.mark.gpu, id="gpu")
STAGES = [pytest.param(stage, id="torch" if stage is None else f"zero{stage}") for stage in (None, 0, 1, 2, 3)]

on_its_device = pytest.mark.parametrize("device", [CPU, GPU])
by_every_engine = pytest.mark.parametrize("stage", STAGES)
# Stage 3 waits for its reductions after each micro batch and reads the norm back (README, "What is not there yet").
by_engines_that_never_wait = pytest.mark.parametrize("stage", STAGES[:-1])
in_both_precisions = pytest.mark.parametrize("precision", ["fp32", "bf16"])
in_every_mask_mode = pytest.mark.parametrize("mode", ["ragged", "official", "budget"])
with_and_without_recomputing = pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])


@pytest.fixture(scope="module", autouse=True)
def group_of_one() -> Iterator[None]:
    """Remove DeepSpeed's process group and environment variables after the tests of this file."""
    before = dict(os.environ)
    yield
    distributed.finish()
    os.environ.clear()
    os.environ.update(before)


def engine_on(
    device: torch.device, stage: int | None, precision: str = "fp32", *, recompute: bool = False, **changes: Any
) -> Engine:
    """Build an engine of one rank with the shipped DeepSpeed files; a step has two micro batches and is clipped.

    Args:
        stage: of ZeRO; None: plain PyTorch.
        changes: settings of `Config` or of `IJEPAConfig`.
    """
    settings = {"compile": "none", "optim": OptimConfig(warmup_epochs=0, clip_grad=0.01), **changes}
    config = small_config(precision=precision, global_batch_size=4, micro_batch_size=2, **settings)
    config = replace(config, model=replace(config.model, activation_checkpointing=recompute))
    ds_config = None if stage is None else CONFIGS / f"zero{stage}.json"
    return engine_of(config, BatchSizes.share(config, 1), device, ds_config)


def batch(engine: Engine, number: int = 0) -> MaskedImages:
    """Micro batch `number`, on the engine's device."""
    return small_batch(config_of(engine), 2, step=number).to(engine.device)


def train(engine: Engine, steps: int) -> Tensor:
    """Train, and return the losses of the micro batches."""
    schedule = Schedule(config_of(engine).optim, steps_per_epoch=steps, total_steps=steps)
    losses = []
    for step in range(steps):
        set_schedule(engine.param_groups, schedule.at(step))
        losses += [engine.micro_step(batch(engine, number)).loss for number in (2 * step, 2 * step + 1)]
    return torch.stack(losses).cpu()


def state(engine: Engine) -> dict[str, list[Tensor]]:
    """The weights (or EMA) and moments of every parameter: views of the optimizer's memory."""
    return {
        piece.name: [piece.view(tensor) for tensor in (piece.tensor, *engine.optimizer.moments(piece.tensor).values())]
        for piece in engine.pieces()
    }


def equal(mine: dict[str, list[Tensor]], theirs: dict[str, list[Tensor]]) -> bool:
    assert mine.keys() == theirs.keys()
    return all(
        torch.equal(x.cpu(), y.cpu())
        for name, tensors in mine.items()
        for x, y in zip(tensors, theirs[name], strict=True)
    )


@contextmanager
def no_waiting() -> Iterator[None]:
    """Raise where the host waits for the GPU.

    PyTorch's own guard sees values that are read back, but no synchronisations.
    """

    def wait(*_: Any) -> None:
        raise AssertionError("the host waits for the GPU")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "synchronize", wait)
        patch.setattr(torch.cuda.Stream, "synchronize", wait)
        patch.setattr(torch.cuda.Event, "synchronize", wait)
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


@on_its_device
@by_every_engine
@in_both_precisions
def test_losses_are_those_of_plain_torch_on_the_cpu(device: torch.device, stage: int | None, precision: str) -> None:
    steps = 3 if device.type == "cpu" else 20  # tests.engine.test_trajectory has more of the CPU
    mine = train(engine_on(device, stage, precision), steps)
    plain = train(engine_on(torch.device("cpu"), None), steps)
    torch.testing.assert_close(mine, plain, rtol=1e-4 if precision == "fp32" else 3e-2, atol=0)


def test_the_message_of_a_kernel_that_cannot_run_names_the_setting() -> None:
    with pytest.raises(ConfigError, match=r"kernels\.linear: linear = onednn cannot run for torch\.bfloat16 on cpu"):
        engine_on(torch.device("cpu"), None, "bf16", kernels=KernelsConfig(linear="onednn"))


@pytest.mark.parametrize("device", [CPU])
@pytest.mark.parametrize("stage", [None, 2])
def test_compiled_engines_train_the_same_bits(
    device: torch.device, stage: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The attention is one that can be compiled on a CPU."""
    for engine in ("torch_engine", "deepspeed_engine"):
        compiler = functools.partial(compile_blocks, backend="aot_eager")
        monkeypatch.setattr(f"fastjepa.engine.{engine}.compile_blocks", compiler)
    kernels = KernelsConfig(block_attention="padded")
    losses = [
        train(engine_on(device, stage, "bf16", recompute=True, kernels=kernels, compile=compile), 3)
        for compile in ("blocks", "none")
    ]
    assert torch.equal(*losses)


@pytest.mark.gpu
@by_engines_that_never_wait
def test_compiled_engines_train_alike_on_a_gpu(stage: int | None) -> None:
    losses = [
        train(engine_on(torch.device("cuda"), stage, "bf16", compile=compile), 20) for compile in ("auto", "none")
    ]
    torch.testing.assert_close(*losses, rtol=3e-2, atol=0)


@on_its_device
@by_every_engine
@in_both_precisions
def test_matrix_products_are_computed_in_the_requested_precision(
    device: torch.device, stage: int | None, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device.type == "cpu":
        # Answer as on a GPU, where DeepSpeed turns off an autocast around its call of the model.
        asked = torch.is_autocast_enabled
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda device_type=device.type: asked(device_type))
    engine = engine_on(device, stage, precision)
    seen: list[torch.dtype] = []

    def look(_: nn.Module, __: Any, output: Tensor | tuple[Tensor, ...]) -> None:
        seen.append((output if isinstance(output, Tensor) else output[0]).dtype)

    for module in engine.model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(look)
    engine.micro_step(batch(engine))
    assert len(seen) > 3 * 8  # the layers of context encoder, target encoder and predictor
    assert set(seen) == {torch.bfloat16 if precision == "bf16" else torch.float32}
    kept_in_bf16 = precision == "bf16" and stage in (1, 2, 3)
    assert {p.dtype for p in engine.model.parameters()} == {torch.bfloat16 if kept_in_bf16 else torch.float32}
    assert {tensor.dtype for tensors in state(engine).values() for tensor in tensors} == {torch.float32}


@on_its_device
@by_every_engine
@in_both_precisions
def test_a_step_that_is_not_finite_changes_nothing(device: torch.device, stage: int | None, precision: str) -> None:
    engine = engine_on(device, stage, precision)
    good, bad = batch(engine), torch.nan

    def step(*factors: float) -> None:
        for factor in factors:
            engine.micro_step(replace(good, images=good.images * factor))

    step(1, 1)
    before = {name: [x.clone() for x in tensors] for name, tensors in state(engine).items()}
    for skipped, factors in enumerate(((bad, 1), (1, bad)), 1):
        step(*factors)
        assert equal(state(engine), before)
        assert (engine.optimizer.updates, int(engine.skipped_in_a_row())) == (1, skipped)
    step(1, 1)
    assert not equal(state(engine), before)
    assert (engine.optimizer.updates, int(engine.skipped_in_a_row())) == (2, 0)


@on_its_device
@by_every_engine
def test_a_background_save_holds_the_state_at_the_call_and_plain_pytorch_on_a_cpu_reads_it(
    device: torch.device, stage: int | None, tmp_path: Path
) -> None:
    engine = engine_on(device, stage, "bf16")
    train(engine, 1)
    expected = {name: [x.cpu().clone() for x in tensors] for name, tensors in state(engine).items()}
    with Checkpointer(tmp_path, keep_last=1, keep_every=None, asynchronous=True) as saves:
        saves.save(engine, RunState(1, {}, {}), last=False)
        train(engine, 3)
    assert not equal(state(engine), expected)
    plain = engine_on(torch.device("cpu"), None)
    restore.load(tmp_path / "step_00000001", plain)
    assert equal(state(plain), expected)
    restore.load(tmp_path / "step_00000001", engine)
    assert equal(state(engine), expected)
    torch.testing.assert_close(train(engine, 1), train(plain, 1), rtol=3e-2, atol=0)


@pytest.mark.gpu
@by_engines_that_never_wait
def test_the_host_does_not_wait_for_a_copy_of_the_state_and_the_next_step_does_not_change_it(stage: int | None) -> None:
    engine = engine_on(torch.device("cuda"), stage, "bf16")
    micro_batch = batch(engine)
    engine.micro_step(micro_batch)
    snapshot = Snapshot.of(engine, RunState(1, {}, {}))
    pinned: dict[str, Tensor] = {}
    assert snapshot.bytes_to_copy(pinned) >= snapshot.bytes
    snapshot.copied(pinned)
    memory = {name: tensor.data_ptr() for name, tensor in pinned.items()}
    assert memory.keys() == snapshot.tensors.keys()
    assert snapshot.bytes_to_copy(pinned) == 0
    before = {name: tensor.cpu() for name, tensor in snapshot.tensors.items()}
    torch.cuda.synchronize()
    with no_waiting():
        torch.cuda._sleep(10**9)  # delays the copy on the stream by about half a second
        copy = snapshot.copied(pinned)
        assert copy.arrived is not None
        on_its_way = not copy.arrived.query()
        engine.micro_step(micro_batch)
    assert on_its_way
    copy.arrived.synchronize()
    assert all(torch.equal(copy.tensors[name], tensor) for name, tensor in before.items())
    assert not any(torch.equal(snapshot.tensors[name].cpu(), tensor) for name, tensor in before.items())
    assert {name: tensor.data_ptr() for name, tensor in copy.tensors.items()} == memory


@pytest.mark.gpu
@by_engines_that_never_wait
@in_both_precisions
@in_every_mask_mode
@with_and_without_recomputing
def test_the_host_never_waits_for_a_step(stage: int | None, precision: str, mode: str, recompute: bool) -> None:
    masks_config = MaskConfig(mode=mode, min_keep=2)  # type: ignore[arg-type]
    engine = engine_on(torch.device("cuda"), stage, precision, recompute=recompute, masks=masks_config)
    assert_the_host_never_waits(engine)


@pytest.mark.gpu
@by_engines_that_never_wait
def test_the_host_never_waits_for_a_compiled_step(stage: int | None) -> None:
    assert_the_host_never_waits(engine_on(torch.device("cuda"), stage, "bf16", compile="blocks"))


def assert_the_host_never_waits(engine: Engine) -> None:
    batches = [batch(engine, number) for number in range(8)]
    batches[4] = replace(batches[4], images=batches[4].images * torch.nan)  # a step that is skipped
    for number, each in enumerate(batches):
        # In the first step the host may wait, because libraries set themselves up.
        with nullcontext() if number < 2 else no_waiting():
            engine.micro_step(each)
    assert (engine.optimizer.updates, int(engine.skipped_in_a_row())) == (3, 0)


@in_every_mask_mode
@with_and_without_recomputing
def test_a_step_reads_nothing_back(mode: str, recompute: bool) -> None:
    """The engine is plain PyTorch, with an attention that may run on a GPU, too."""
    masks_config = MaskConfig(mode=mode, min_keep=2)  # type: ignore[arg-type]
    kernels = KernelsConfig(block_attention="padded")
    engine = engine_on(torch.device("cpu"), None, recompute=recompute, masks=masks_config, kernels=kernels)
    assert isinstance(engine, TorchEngine)
    engine._passes = engine._forward_and_backward  # the micro batch is computed whole, as on a GPU
    micro_batch = batch(engine)
    micro_batch = replace(micro_batch, images=micro_batch.images.mul(64).add(128).clamp(0, 255).byte())
    for _ in range(2):
        engine.micro_step(micro_batch)
    with ReadBacks() as read_backs:
        for _ in range(2):
            engine.micro_step(micro_batch)
    # These send constants to the device, which their Triton kernels take as arguments or find on the device.
    assert read_backs.by_file.keys() == {"optim/adamw_ema.py", "fastjepa_kernels/adamw_ema.py"}


@pytest.mark.parametrize("device", [CPU])
@by_every_engine
@in_both_precisions
def test_an_engine_itself_reads_nothing_back(device: torch.device, stage: int | None, precision: str) -> None:
    """The files of model and kernels are left out, because they take other paths on a CPU."""
    engine = engine_on(device, stage, precision)
    for _ in range(2):
        engine.micro_step(batch(engine))
    with ReadBacks() as read_backs:
        for _ in range(2):
            engine.micro_step(batch(engine))
    assert (
        read_backs.by_file["optim/adamw_ema.py"] == 4
    )  # the schedule of each group, made on the host: sent without waiting
    ours = {file for file in read_backs.by_file if file.startswith("engine/")}
    deepspeeds = {"zero/stage_1_and_2.py", "zero/stage3.py", "runtime/utils.py"} & read_backs.by_file.keys()
    assert ours == set()
    assert deepspeeds == ({"zero/stage3.py", "runtime/utils.py"} if stage == 3 else set())


@pytest.mark.parametrize("device", [CPU])
@pytest.mark.parametrize("stage", [1, 2])
def test_after_a_backward_pass_the_stream_and_not_the_host_waits_for_the_reductions(
    device: torch.device, stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CPU pretends to have streams, which do nothing."""
    events: list[str] = []

    class Stream:
        def __init__(self, name: str) -> None:
            self.name = name

        def wait_stream(self, other: Stream) -> None:
            events.append(f"{self.name} waits for {other.name}")

    engine = engine_on(device, stage)
    assert isinstance(engine, DeepSpeedEngine)
    zero, current = engine._engine.optimizer, Stream("current")
    accelerator = sys.modules[type(zero).__module__].get_accelerator()
    monkeypatch.setattr(zero, "reduction_stream", Stream("reduction"))
    monkeypatch.setattr(accelerator, "resolves_data_dependency", lambda: False)
    monkeypatch.setattr(accelerator, "current_stream", lambda: current)
    monkeypatch.setattr(type(accelerator), "synchronize", lambda *_: events.append("the host waits"))
    monkeypatch.setattr(Tensor, "record_stream", lambda *_: None)
    release = zero._release_ipg_buffers

    def gradients_were_read() -> None:
        events.append("gradients are read")
        release()

    monkeypatch.setattr(zero, "_release_ipg_buffers", gradients_were_read)
    for _ in range(2):
        engine.micro_step(batch(engine))
    assert "the host waits" not in events
    reads = [index for index, event in enumerate(events) if event == "gradients are read"]
    assert len(reads) == stage  # stage 1 reduces in the last micro batch only
    for index in reads:
        assert events[index - 1] == "current waits for reduction"
        # Not only the wait that comes before a reduction is launched, for the one before it.
        assert events[index - 2] == "current waits for reduction"
    assert isinstance(accelerator.synchronize, type(release))  # the patch is gone: others may make the host wait


def test_every_operation_that_cannot_run_as_requested_is_a_configuration_error() -> None:
    try:
        for kernels in (KernelsConfig(target_loss="triton"), KernelsConfig(linear="onednn")):  # the latter not in bf16
            with pytest.raises(
                ConfigError, match=r"kernels\.(target_loss|linear): .* cannot run for torch.bfloat16 on"
            ):
                engine_on(torch.device("cpu"), None, "bf16", kernels=kernels)
    finally:
        fastjepa_kernels.request({})
