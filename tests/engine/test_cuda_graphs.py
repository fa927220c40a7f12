"""compile=cuda_graphs: the shapes of a step are static, and replayed graphs train as called functions do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import fastjepa_kernels
from fastjepa.config import Config, KernelsConfig
from fastjepa.config.batch_sizes import BatchSizes
from fastjepa.engine.cuda_graphs import GraphedPasses
from fastjepa.engine.torch_engine import TorchEngine
from fastjepa.errors import ConfigError
from fastjepa.objectives.base import Output
from fastjepa.objectives.ijepa.block_sizes import MaskConfig
from fastjepa.objectives.ijepa.masks import sample_masks
from fastjepa.objectives.ijepa.objective import MaskedImages
from fastjepa.objectives.ijepa.settings import IJEPAConfig, Savings
from tests.engine.test_engines import no_waiting
from tests.support.small import engine_of, small_config

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_requests() -> Iterator[None]:
    yield
    fastjepa_kernels.request({})


def config_with(*, mode: str = "budget", target_last_block: bool = False, **changes: Any) -> Config:
    return small_config(
        masks=MaskConfig(mode=mode, min_keep=2),  # type: ignore[arg-type]
        savings=Savings(target_last_block=target_last_block),
        micro_batch_size=2,
        **changes,
    )


def engine_on(device: torch.device, config: Config) -> TorchEngine:
    engine = engine_of(config, BatchSizes.share(config, 1), device)
    assert isinstance(engine, TorchEngine)
    return engine


def batch(config: Config, step: int, number: int, device: torch.device = CPU) -> MaskedImages:
    """Two images whose block sizes depend on `step` alone, and whose pixels and positions depend on `number`."""
    images = torch.randn(2, 2, 24, 32, generator=torch.Generator().manual_seed(number))
    indices = 2 * number + torch.arange(2)
    rules = IJEPAConfig.of(config).masks
    masks = sample_masks(rules, config.grid_h, config.grid_w, seed=1, step=step, sample_indices=indices)
    return MaskedImages(images, masks).to(device)


class Shapes(TorchDispatchMode):
    """A mode that lists every ATen operation with the shapes and numbers that it is given."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "aten":
            self.seen.append((func, *tree_map_only(Tensor, lambda x: (x.shape, x.stride()), (args, kwargs or {}))))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("changes", "static"),
    [({}, True), ({"target_last_block": True}, False), ({"mode": "ragged"}, False), ({"mode": "official"}, False)],
    ids=["budget", "budget with the union", "ragged", "official"],
)
def test_all_shapes_of_forward_and_backward_are_static_in_budget_mode(changes: dict[str, Any], static: bool) -> None:
    config = config_with(kernels=KernelsConfig(block_attention="padded"), **changes)
    engine = engine_on(CPU, config)
    logs = []
    for number in range(4):
        each = batch(config, 3, number)
        with Shapes() as shapes:
            engine._forward_and_backward(each)
        logs.append(shapes.seen)
    assert len(logs[0]) > 500
    assert all(log == logs[0] for log in logs) == static


def called_again(run: Callable[[], Output]) -> tuple[Callable[[], None], Output]:
    """Stand in for a capture: a replay calls the function that would have been captured."""
    result = torch.full((), torch.nan)

    def replay() -> None:
        result.copy_(run().loss)

    return replay, Output(result, {})


def test_replays_train_the_same_bits() -> None:
    config = config_with(compile="none")
    plain, graphed = engine_on(CPU, config), engine_on(CPU, config)
    captures: list[Callable[[], Output]] = []

    def capture(run: Callable[[], Output]) -> tuple[Callable[[], None], Output]:
        captures.append(run)
        return called_again(run)

    graphed._passes = GraphedPasses(graphed._forward_and_backward, capture)
    losses, expected, sizes = [], [], []
    for number in range(16):
        each = batch(config, number // 2, number)
        sizes.append(each.masks.target_lengths.total)
        expected.append(plain.micro_step(each).loss)
        losses.append(graphed.micro_step(each).loss)
        each.images.fill_(torch.nan)  # the loader may use this memory again
    assert torch.equal(torch.stack(losses), torch.stack(expected))
    assert len(set(sizes)) > 1
    assert len(captures) == len({size for size in sizes if sizes.count(size) > 1})


@pytest.mark.parametrize("changes", [{"mode": "ragged"}, {"target_last_block": True}], ids=["ragged", "with the union"])
def test_settings_whose_shapes_are_not_static_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"compile = 'cuda_graphs': expected objective\.masks\.mode = budget, "):
        config_with(compile="cuda_graphs", **changes)


def test_graphs_need_a_gpu() -> None:
    with pytest.raises(ConfigError, match=r"CUDA graphs are for plain PyTorch \(no --ds_config\) on a GPU"):
        engine_on(CPU, config_with(compile="cuda_graphs"))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_on_a_gpu_replays_train_as_calls_do_and_the_host_never_waits(precision: str) -> None:
    device = torch.device("cuda")
    config = config_with(compile="cuda_graphs", precision=precision)
    graphed, called = engine_on(device, config), engine_on(device, replace(config, compile="blocks"))
    batches = [batch(config, number // 2, number, device) for number in range(40)]
    expected = torch.stack([called.micro_step(each).loss for each in batches])
    sizes: list[int] = []
    losses = []
    for each in batches:
        sizes.append(each.masks.target_lengths.total)
        with no_waiting() if sizes.count(sizes[-1]) > 2 else nullcontext():
            losses.append(graphed.micro_step(each).loss)
    torch.testing.assert_close(torch.stack(losses), expected, rtol=1e-5 if precision == "fp32" else 1e-2, atol=0)
    assert len(set(sizes)) > 1
