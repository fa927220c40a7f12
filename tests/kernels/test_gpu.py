"""Tests that need a GPU: the operations can be captured in CUDA graphs and compiled, and the host never waits for them."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from benchmarks.kernel_cases import Shape
from fastjepa_kernels import (
    adamw_ema_,
    block_attention_packed,
    gather_add,
    gather_patches,
    masked_gather,
    target_loss,
)

pytestmark = pytest.mark.gpu

_SHAPE = Shape("small", "vit_small", 16, 14, 384, batch_size=4)
_Operation = Callable[[], tuple[Tensor, ...]]


def _operations() -> dict[str, _Operation]:
    device = torch.device("cuda")
    masks = _SHAPE.masks.to(device)
    generator = torch.Generator(device).manual_seed(0)

    def rows(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=generator).bfloat16().requires_grad_()

    images = torch.randint(0, 256, (4, 3, 224, 224), device=device, dtype=torch.uint8)
    qkv, tokens = rows(masks.context_lengths.total, 3, 6, 64), rows(masks.context_lengths.total + 196, 384)
    predictions, features = rows(masks.target_lengths.total, 384), rows(masks.union_lengths.total, 384).detach()
    table = torch.randn(196, 384, device=device, generator=generator)
    context_tokens = rows(masks.context_lengths.total, 384)

    def differentiated(function: Callable[..., Tensor], x: Tensor, *args: object) -> tuple[Tensor, ...]:
        out = function(x, *args)
        return out.detach(), *torch.autograd.grad(out.float().square().sum(), x)

    return {
        "block_attention": lambda: differentiated(block_attention_packed, qkv, masks.context_lengths),
        "masked_gather": lambda: differentiated(masked_gather, tokens, masks.predictor_rows),
        "gather_patches": lambda: (gather_patches(images, masks.context_indices, 16, dtype=torch.bfloat16),),
        "gather_add": lambda: differentiated(gather_add, context_tokens, table, masks.context_indices % 196),
        "target_loss": lambda: differentiated(target_loss, predictions, features, masks.union_rows),
    }


@pytest.fixture(params=["block_attention", "masked_gather", "gather_patches", "gather_add", "target_loss"])
def operation(request: pytest.FixtureRequest) -> _Operation:
    return _operations()[request.param]


@pytest.fixture
def no_synchronisation() -> Iterator[Callable[[str], None]]:
    yield torch.cuda.set_sync_debug_mode
    torch.cuda.set_sync_debug_mode("default")


def test_the_host_never_waits_for_an_operation(
    operation: _Operation, no_synchronisation: Callable[[str], None]
) -> None:
    operation()  # during the first call the host may wait: it compiles, and tries configurations
    torch.cuda.synchronize()
    no_synchronisation("error")
    operation()


def test_a_captured_operation_gives_the_same_numbers_when_replayed(operation: _Operation) -> None:
    expected = operation()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = operation()
    for tensor in captured:
        tensor.fill_(float("nan"))
    graph.replay()
    torch.testing.assert_close(captured, expected, rtol=0, atol=0)


def test_an_operation_compiles_into_one_graph_with_the_same_numbers() -> None:
    masks = _SHAPE.masks.to(torch.device("cuda"))
    qkv = torch.randn(masks.context_lengths.total, 3, 6, 64, device="cuda").bfloat16()
    table = torch.randn(196, 384, device="cuda")

    def several() -> Tensor:
        tokens = block_attention_packed(qkv, masks.context_lengths).flatten(1)
        tokens = gather_add(tokens, table, masks.context_indices % 196)
        predictions = masked_gather(tokens, masks.predictor_target_rows % len(tokens))
        return target_loss(predictions, table, masks.target_indices % 196)

    torch.testing.assert_close(torch.compile(several, fullgraph=True)(), several(), rtol=1e-2, atol=1e-2)


def test_a_captured_update_follows_the_scalars_on_the_device() -> None:
    def state() -> dict[str, Tensor]:
        generator = torch.Generator("cuda").manual_seed(0)
        names = ("param", "grad", "exp_avg", "exp_avg_sq", "ema")
        tensors = {name: torch.randn(4096, device="cuda", generator=generator) for name in names}
        tensors["exp_avg_sq"].square_()
        return tensors

    def scalars(step: float, lr: float) -> dict[str, Tensor]:
        return {
            name: torch.tensor(value, device="cuda")
            for name, value in {"step": step, "lr": lr, "weight_decay": 0.1, "ema_momentum": 0.9}.items()
        }

    fixed = {"betas": (0.9, 0.999), "eps": 1e-8}
    mine, hyper = state(), scalars(1.0, 1e-3)
    adamw_ema_(**mine, **hyper, **fixed)  # type: ignore[arg-type]
    mine = state()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        adamw_ema_(**mine, **hyper, **fixed)  # type: ignore[arg-type]
    for name, value in state().items():
        mine[name].copy_(value)
    for name, value in scalars(7.0, 1e-2).items():
        hyper[name].copy_(value)
    graph.replay()
    expected = state()
    adamw_ema_(**expected, **scalars(7.0, 1e-2), **fixed)  # type: ignore[arg-type]
    torch.testing.assert_close(mine, expected, rtol=0, atol=0)
