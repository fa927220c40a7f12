"""compile=blocks: no batch needs a new graph, and the numbers are those of plain blocks (test_engines has whole engines)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastjepa_kernels
from fastjepa.config import Config, KernelsConfig
from fastjepa.engine.compilation import compile_blocks, compiles_blocks
from fastjepa.errors import ConfigError
from fastjepa.models.layers import Block
from fastjepa.objectives.ijepa.block_sizes import MaskConfig
from fastjepa.objectives.ijepa.objective import IJEPAObjective, MaskedImages
from fastjepa.objectives.registry import method_of
from fastjepa_kernels import Operation, Ragged
from tests.support.small import build_ijepa, small_batch, small_config

SHAPE_CLASSES = 5
"""Graphs of a model: context encoder; target encoder, its last block; first and last block of the predictor."""


@pytest.fixture(autouse=True)
def no_graphs_yet() -> Iterator[None]:
    """Forget compiled graphs, and choose an attention that can be compiled on a CPU."""
    fastjepa_kernels.request({} if torch.cuda.is_available() else {"block_attention": "padded"})
    torch.compiler.reset()
    _counters().clear()
    yield
    fastjepa_kernels.request({})


def _counters() -> Any:
    from torch._dynamo.utils import counters  # the import takes a second, which only these tests need

    return counters


def config_with(*, mode: str = "ragged", recompute: bool = False, **changes: Any) -> Config:
    attention = "auto" if torch.cuda.is_available() else "padded"
    config = small_config(
        masks=MaskConfig(mode=mode, min_keep=2),  # type: ignore[arg-type]
        kernels=KernelsConfig(block_attention=attention),  # type: ignore[arg-type]
        **changes,
    )
    return replace(config, model=replace(config.model, activation_checkpointing=recompute))


def operations(config: Config, dtype: torch.dtype = torch.float32) -> list[Operation]:
    """The operations that the blocks of a run call."""
    return method_of(config).operations(dtype)


def batches(device: torch.device) -> Iterator[MaskedImages]:
    """Batches whose lengths, sizes and mask modes differ."""
    for step, (mode, size) in enumerate((("ragged", 3), ("ragged", 3), ("ragged", 5), ("official", 3), ("budget", 2))):
        yield small_batch(config_with(mode=mode), size, step=step).to(device)


def loss_and_gradients(model: IJEPAObjective, batch: MaskedImages, autocast: torch.dtype | None) -> list[Tensor]:
    loss: Tensor = model(batch, autocast).loss
    return [loss.detach(), *torch.autograd.grad(loss, model.trained_parameters())]


def assert_no_graph_is_compiled_twice() -> None:
    assert not _counters()["graph_break"]
    assert _counters()["stats"]["unique_graphs"] == SHAPE_CLASSES


@pytest.mark.parametrize(
    ("recompute", "autocast"), [(False, None), (True, torch.bfloat16)], ids=["fp32", "bf16-recomputed"]
)
def test_other_batches_need_no_new_graph_and_give_the_same_bits(recompute: bool, autocast: torch.dtype | None) -> None:
    plain, compiled = (build_ijepa(config_with(recompute=recompute)) for _ in range(2))
    compile_blocks(compiled, "aot_eager")
    for step, batch in enumerate(batches(torch.device("cpu"))):
        with torch.compiler.set_stance("fail_on_recompile" if step else "default"):
            mine = loss_and_gradients(compiled, batch, autocast)
        expected = loss_and_gradients(plain, batch, autocast)
        assert all(torch.equal(x, y) for x, y in zip(mine, expected, strict=True))
    assert_no_graph_is_compiled_twice()


@pytest.mark.parametrize("width", [24])
def test_a_block_that_inductor_compiles_for_the_cpu_gives_the_same_numbers(width: int) -> None:
    plain = Block(width, 3, mlp_ratio=4.0)
    compiled = Block(width, 3, mlp_ratio=4.0)
    compiled.load_state_dict(plain.state_dict())
    compile_blocks(compiled)
    for lengths in ([3, 7, 5], [4, 1, 9, 2]):
        ragged = Ragged.from_lengths(torch.tensor(lengths))
        x = torch.randn(ragged.total, width, requires_grad=True)
        results = [(out := block(x, ragged), torch.autograd.grad(out.square().sum(), x)) for block in (plain, compiled)]
        torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
    assert _counters()["stats"]["unique_graphs"] == 1


def test_small_and_large_products_share_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside of a graph, small and large products may have different implementations."""
    monkeypatch.setattr(sys.modules["fastjepa_kernels.linear"], "_SMALL", 2 * 20 * 24 * 24)
    block = Block(24, 3, mlp_ratio=4.0)
    compile_blocks(block, "aot_eager")
    for length in (2, 30):
        block(torch.randn(3 * length, 24), Ragged.uniform(3, length))
    assert _counters()["stats"]["unique_graphs"] == 1


def test_a_compiled_block_keeps_its_hooks() -> None:
    """Hooks wait for the weights of the block at ZeRO 1 and 2."""
    block, calls = Block(24, 3, mlp_ratio=4.0), []
    compile_blocks(block, "eager")
    block.register_forward_pre_hook(lambda *_: calls.append("waited"))
    for _ in range(3):
        block(torch.randn(6, 24), Ragged.uniform(2, 3))
    assert calls == ["waited"] * 3


@pytest.mark.parametrize(
    ("stage", "attention", "message"),
    [
        (3, "padded", "compile = blocks: ZeRO 3 gathers weights between the layers of a block; use compile=none"),
        (
            None,
            "buckets",
            "compile = blocks: kernels.block_attention = buckets cannot be part of a compiled graph; use",
        ),
    ],
)
def test_blocks_that_cannot_be_compiled_are_refused_with_the_reason(
    stage: int | None, attention: str, message: str
) -> None:
    config = config_with(compile="blocks")
    fastjepa_kernels.request({"block_attention": attention})
    with pytest.raises(ConfigError) as raised:
        compiles_blocks(config, operations(config), torch.device("cpu"), stage)
    assert str(raised.value).startswith(message)


def test_nothing_is_compiled_on_a_cpu_unless_it_is_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "fastjepa")
    config = config_with()
    assert not compiles_blocks(config, operations(config), torch.device("cpu"), None)
    assert caplog.messages[-1] == "compile: none (on a CPU it gains nothing)"


@pytest.mark.parametrize(
    ("capability", "stage", "compiled"),
    [((8, 0), None, True), ((8, 0), 2, True), ((8, 0), 3, False), ((6, 0), None, False)],
)
def test_blocks_are_compiled_on_gpus_that_support_it(
    capability: tuple[int, int], stage: int | None, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    for module in ("fastjepa.engine.compilation", "fastjepa_kernels.selection"):
        monkeypatch.setattr(f"{module}.triton_problem", lambda: None)
    config = config_with()
    assert compiles_blocks(config, operations(config), torch.device("cuda"), stage) == compiled


def test_nothing_is_compiled_where_triton_cannot_start_and_the_reason_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr("fastjepa.engine.compilation.triton_problem", lambda: "triton needs a C compiler")
    caplog.set_level("INFO", "fastjepa")
    device, config = torch.device("cuda"), config_with()
    called = operations(config, torch.bfloat16)
    assert not compiles_blocks(config, called, device, None)
    assert caplog.messages[-1] == "compile: none (triton needs a C compiler)"
    with pytest.raises(ConfigError, match="compile = blocks: triton needs a C compiler; use compile=none"):
        compiles_blocks(config_with(compile="blocks"), called, device, None)


def test_blocks_stay_plain_where_the_compiler_fails_unless_it_was_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    """A compiler that fails is logged with compile=auto, and is an error with compile=blocks."""

    def broken(*_: Any) -> Any:
        raise RuntimeError("ptxas does not know this GPU")

    blocks = nn.ModuleList(Block(24, 3, mlp_ratio=4.0) for _ in range(2))
    arguments = torch.randn(6, 24), Ragged.uniform(2, 3)
    expected = [block(*arguments) for block in blocks]
    compile_blocks(blocks, broken, may_give_up=True)  # type: ignore[arg-type]
    assert all(torch.equal(block(*arguments), out) for block, out in zip(blocks, expected, strict=True))
    (message,) = (record.getMessage() for record in caplog.records if record.name.startswith("fastjepa."))
    assert message.startswith("compile: none from here on")
    assert "ptxas does not know this GPU" in message
    compile_blocks(blocks, broken)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="ptxas does not know this GPU"):
        blocks[0](*arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_on_a_gpu_other_batches_need_no_new_graph(autocast: torch.dtype | None) -> None:
    plain, compiled = (build_ijepa(config_with()).cuda() for _ in range(2))
    compile_blocks(compiled)
    for step, batch in enumerate(batches(torch.device("cuda"))):
        with torch.compiler.set_stance("fail_on_recompile" if step else "default"):
            mine = loss_and_gradients(compiled, batch, autocast)
        tolerance = 3e-2 if autocast else 1e-4
        for x, y in zip(mine, loss_and_gradients(plain, batch, autocast), strict=True):
            torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance * float(y.abs().max()))
    assert_no_graph_is_compiled_twice()
