"""The fused optimizer step in Triton: values, skipped updates, hyper-parameters on the device, wide accesses."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastjepa_kernels.adamw_ema import adamw_ema_
from fastjepa_kernels.reference import adamw_ema_reference
from tests.kernels.triton.conftest import Engine, compiled_only, interpreted_only, simulator_runs
from tests.support.accuracy import assert_close_to_reference

HYPER: dict[str, Any] = {
    "step": 7,
    "lr": 1e-2,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "weight_decay": 0.1,
    "ema_momentum": 0.99,
}
BLOCK = 512
CPU = Engine("cpu", torch.device("cpu"))
SENTINEL = 12345.0


def guarded(values: Tensor, engine: Engine) -> Tensor:
    """A copy on the engine's device with a sentinel behind its last element."""
    buffer = torch.full((values.numel() + 64,), SENTINEL, dtype=values.dtype)
    buffer[: values.numel()] = values
    return buffer.to(engine.device)[: values.numel()]


def assert_guard_stands(tensor: Tensor) -> None:
    behind = tensor.as_strided((64,), (1,), tensor.numel()).cpu()
    assert torch.equal(behind, torch.full_like(behind, SENTINEL))


def state_of(n: int, engine: Engine, grad_dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """The tensors in the order of the arguments. Second moments go from tiny to large, as they do between layers."""
    generator = torch.Generator().manual_seed(n)
    param, grad, exp_avg, spread, ema = (torch.randn(n, generator=generator) for _ in range(5))
    values = {
        "param": param,
        "grad": (1e-2 * grad).to(grad_dtype),
        "exp_avg": 1e-2 * exp_avg,
        "exp_avg_sq": torch.exp(4 * spread - 12),
        "ema": ema,
    }
    return {name: guarded(value, engine) for name, value in values.items()}


def poisoned(n: int, dtype: torch.dtype, engine: Engine) -> Tensor:
    return guarded(torch.full((n,), math.nan, dtype=dtype), engine)


def scalars(engine: Engine, *values: float) -> tuple[Tensor, ...]:
    """Scalars as elements of one tensor, so that they are not aligned to 16 bytes."""
    return torch.tensor(values, dtype=torch.float64, device=engine.device).unbind()


def assert_updated(state: dict[str, Any], before: dict[str, Any], **hyper: Any) -> None:
    result = [x.cpu() for name, x in state.items() if name != "grad"]
    start = [before[name].cpu() for name in state]
    plain = adamw_ema_reference(*start, **hyper)
    exact = adamw_ema_reference(*(x.double() for x in start), **hyper)
    for mine, same_dtype, truth in zip(result, plain, exact, strict=True):
        assert_close_to_reference(mine, same_dtype, truth)
    for tensor in state.values():
        assert_guard_stands(tensor)


@simulator_runs(lambda n: n in (17, BLOCK, BLOCK + 1))
@pytest.mark.parametrize("n", [1, 15, 16, 17, BLOCK - 1, BLOCK, BLOCK + 1, 1000])
def test_weights_moments_and_average_follow_adamw(engine: Engine, n: int) -> None:
    state = state_of(n, engine)
    before = {name: x.clone() for name, x in state.items()}
    adamw_ema_(**state, **HYPER)
    assert_updated(state, before, **HYPER)


@simulator_runs(lambda grad_dtype, copy_dtype: grad_dtype == copy_dtype)
@pytest.mark.parametrize("copy_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grad_dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_gradients_are_scaled_in_fp32_and_the_copies_are_the_rounded_results(
    engine: Engine, grad_dtype: torch.dtype, copy_dtype: torch.dtype
) -> None:
    n = BLOCK + 17
    state = state_of(n, engine, grad_dtype)
    before = {name: x.clone() for name, x in state.items()}
    copies: dict[str, Any] = {
        "param_copy": poisoned(n, copy_dtype, engine),
        "ema_copy": poisoned(n, copy_dtype, engine),
    }
    (grad_scale,) = scalars(engine, 0.3)
    adamw_ema_(**state, **HYPER, grad_scale=grad_scale, **copies)
    assert_updated(state, before, **HYPER, grad_scale=0.3)
    assert torch.equal(copies["param_copy"], state["param"].to(copy_dtype))
    assert torch.equal(copies["ema_copy"], state["ema"].to(copy_dtype))
    for copy in copies.values():
        assert_guard_stands(copy)


def test_elements_that_no_program_wrote_would_be_seen(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A negative control of the two tests above."""
    import triton

    monkeypatch.setattr(triton, "cdiv", lambda a, b: a // b)
    n = BLOCK + 17
    state = state_of(n, engine, torch.bfloat16)
    before = {name: x.clone() for name, x in state.items()}
    copy = poisoned(n, torch.bfloat16, engine)
    adamw_ema_(**state, **HYPER, param_copy=copy)
    with pytest.raises(AssertionError, match="error"):
        assert_updated(state, before, **HYPER)
    assert not torch.equal(copy, state["param"].bfloat16())


def test_without_an_average_it_is_adamw(engine: Engine) -> None:
    state = state_of(20, engine)
    before = {name: x.clone() for name, x in state.items()}
    adamw_ema_(**state | {"ema": None}, **HYPER)
    assert torch.equal(state["ema"], before["ema"])
    assert_updated(state, before, **HYPER | {"ema_momentum": 1.0})


@pytest.mark.parametrize("found", [1.0, math.inf, math.nan])
def test_nothing_changes_after_an_overflow(engine: Engine, found: float) -> None:
    n = BLOCK + 3
    state = state_of(n, engine)
    before = {name: x.clone() for name, x in state.items()}
    copies: dict[str, Any] = {
        name: guarded(torch.full((n,), 3.0).bfloat16(), engine) for name in ("param_copy", "ema_copy")
    }
    found_inf, ok = torch.tensor([found, 0.0], device=engine.device).unbind()
    state["grad"].fill_(math.inf)
    adamw_ema_(**state, **HYPER, found_inf=found_inf, **copies)
    for name in ("param", "exp_avg", "exp_avg_sq", "ema"):
        assert torch.equal(state[name], before[name]), name
    for copy in copies.values():
        assert bool((copy == 3).all())
    state["grad"].copy_(before["grad"])
    adamw_ema_(**state, **HYPER, found_inf=ok, **copies)
    assert_updated(state, before, **HYPER)
    assert torch.equal(copies["param_copy"], state["param"].bfloat16())


@pytest.mark.parametrize("betas", [(0.9, 0.0), (0.0, 0.999)])
def test_bias_corrections_are_exact_from_the_first_step_to_the_millionth(
    engine: Engine, betas: tuple[float, float]
) -> None:
    """With m = g = v = 1, lr = 1 and an eps next to 0, a weight of 0 becomes -sqrt(1 - b2^t) / (1 - b1^t)."""
    steps = [1, 2, 3, 4, 5, 6, 10, 100, 480, 500, 520, 1000, 10_000, 1_000_000]
    limit = 5e-7
    assert abs((1 - torch.tensor(0.999)).item() / 1e-3 - 1) > 10 * limit  # what a plain subtraction in fp32 would give
    for step in steps if engine.thorough else [1, 4, 5, 500, 1_000_000]:
        one = torch.ones(1, device=engine.device)
        param = torch.zeros(1, device=engine.device)
        hyper = HYPER | {"step": step, "betas": betas, "lr": 1.0, "eps": 1e-30, "weight_decay": 0.0}
        adamw_ema_(param, one, one.clone(), one.clone(), None, **hyper)
        expected = -math.sqrt(-math.expm1(step * math.log(betas[1])) if betas[1] else 1.0)
        expected /= -math.expm1(step * math.log(betas[0])) if betas[0] else 1.0
        assert param.item() == pytest.approx(expected, rel=limit), step


def test_a_momentum_next_to_one_keeps_its_digits(engine: Engine) -> None:
    param, moments, ema = (torch.full((1,), value, device=engine.device) for value in (1.0, 0.0, 0.0))
    (momentum,) = scalars(engine, 1 - 1e-7)
    hyper = HYPER | {"lr": 0.0, "weight_decay": 0.0, "ema_momentum": momentum}
    adamw_ema_(param, moments, moments.clone(), moments.clone(), ema, **hyper)
    assert ema.item() == pytest.approx(1e-7, rel=1e-6)


@compiled_only
def test_new_hyper_parameters_and_sizes_need_no_new_compilation(engine: Engine) -> None:
    from fastjepa_kernels.triton_kernels import adamw_ema as module

    def variants() -> int:
        return sum(len(cache[0]) for cache in module._adamw_ema_kernel.device_caches.values())

    counts = []
    for n, step in ((16, 1), (1, 2), (35, 16)):
        state = state_of(n, engine)
        before = {name: x.clone() for name, x in state.items()}
        sent = scalars(engine, 1e-2 * step, step, 0.01 * step, 1 - 0.1 * step / n)
        lr, count, weight_decay, momentum = sent if step == 1 else [x.clone() for x in sent]  # aligned or not
        hyper = {"step": count, "lr": lr, "weight_decay": weight_decay, "ema_momentum": momentum}
        adamw_ema_(**state, **HYPER | hyper)
        assert_updated(state, before, **HYPER | {name: x.item() for name, x in hyper.items()})
        counts.append(variants())
    assert len(set(counts)) == 1, counts


def test_empty_tensors_are_left_alone(engine: Engine) -> None:
    empty = torch.empty(0, device=engine.device)
    adamw_ema_(empty, empty, empty.clone(), empty.clone(), empty.clone(), **HYPER)


@interpreted_only  # the contract does not depend on the engine
def test_the_operator_keeps_pytorchs_contract(engine: Engine) -> None:
    from fastjepa_kernels.triton_kernels.adamw_ema import adamw_ema_op

    state = list(state_of(20, engine).values())
    copy = torch.zeros(20, dtype=torch.bfloat16)
    numbers = scalars(engine, 3, 1e-2, 0.1, 0.99)
    torch.library.opcheck(adamw_ema_op, (*state, copy, copy.clone(), *numbers, None, None, 0.9, 0.999, 1e-8))
    torch.library.opcheck(adamw_ema_op, (*state[:4], None, None, None, *numbers, *numbers[:2], 0.9, 0.999, 1e-8))


@compiled_only
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_each_byte_is_moved_once_in_the_widest_accesses(target: str) -> None:
    """An element takes 38 bytes with both copies, and an instruction moves 4 elements per thread."""
    from benchmarks.proofs.aot.launches import simulated

    n, warps = 3 * BLOCK, 3 * BLOCK // (4 * 32)
    state = state_of(n, CPU, torch.bfloat16)
    copy = poisoned(n, torch.bfloat16, CPU)
    step, lr, weight_decay, momentum, grad_scale, found_inf = scalars(CPU, 7, 1e-2, 0.1, 0.99, 0.5, 0.0)
    hyper = {"step": step, "lr": lr, "weight_decay": weight_decay, "ema_momentum": momentum}
    with simulated(target) as counts:
        adamw_ema_(
            **state,
            **HYPER | hyper,
            grad_scale=grad_scale,
            found_inf=found_inf,
            param_copy=copy,
            ema_copy=copy.clone(),
        )
    (update,) = counts
    assert update["global_sectors"] == {"load": 18 * n // 32 + 6 * warps, "store": 20 * n // 32}
    assert update["global_requests"] == {"load": (5 + 6) * warps, "store": 6 * warps}


@compiled_only
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_elements_beyond_two_to_the_31_are_addressed_in_64_bits(target: str, tmp_path: Path) -> None:
    """Run the last two programs of such a launch, on sparse files of which only the touched pages exist."""
    from benchmarks.proofs import ptxsim
    from benchmarks.proofs.aot.launches import recorded

    n = 2**31 + BLOCK + 5
    tail = slice(2**31, n)
    state: dict[str, Any] = {
        name: torch.from_file(str(tmp_path / name), shared=True, size=n) for name in state_of(1, CPU)
    }
    for name in state:
        (tmp_path / name).unlink()  # the mapping keeps the file alive
    for name in ("param", "grad"):
        state[name][tail] = 1.0
    with recorded(target) as launches:
        adamw_ema_(**state, **HYPER | {"step": 1, "weight_decay": 0.0, "ema_momentum": 0.5})
    (launch,) = launches
    assert launch.grid == (2**22 + 2, 1, 1)
    ctas = [(2**22, 0, 0), (2**22 + 1, 0, 0)]
    ptxsim.launch(launch.kernel, launch.grid, list(launch.arguments.values()), ctas=ctas)
    torch.testing.assert_close(state["param"][tail], torch.full((BLOCK + 5,), 0.99))
    torch.testing.assert_close(state["ema"][tail], torch.full((BLOCK + 5,), 0.495))
    for elsewhere in (slice(2 * BLOCK), slice(2**31 - 2 * BLOCK, 2**31)):
        assert not state["param"][elsewhere].any()


@pytest.mark.gpu
@compiled_only
def test_a_replayed_graph_sees_new_hyper_parameters() -> None:
    engine = Engine("cuda", torch.device("cuda"))
    state = state_of(BLOCK + 3, engine)
    numbers = torch.tensor([7, 1e-2, 0.1, 0.99, 0.0], dtype=torch.float64, device="cuda")
    step, lr, weight_decay, momentum, found_inf = numbers.unbind()
    hyper = HYPER | {"step": step, "lr": lr, "weight_decay": weight_decay, "ema_momentum": momentum}
    adamw_ema_(**state, **hyper, found_inf=found_inf)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step += found_inf == 0
        adamw_ema_(**state, **hyper, found_inf=found_inf)
    before = {name: x.clone() for name, x in state.items()}
    numbers[:4] = torch.tensor([8, 3e-2, 0.2, 0.9])
    graph.replay()
    assert_updated(state, before, **HYPER | {"step": 9, "lr": 3e-2, "weight_decay": 0.2, "ema_momentum": 0.9})
    before = {name: x.clone() for name, x in state.items()}
    found_inf.fill_(1)
    graph.replay()
    assert step.item() == 9
    assert all(torch.equal(state[name], before[name]) for name in state)
