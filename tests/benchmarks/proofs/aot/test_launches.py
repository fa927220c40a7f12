"""Launches are caught as a GPU would get them: specialised for their arguments, with grid and configuration."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import driver
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

from benchmarks.proofs.aot.launches import Launch, caught, counted, parse_target, recorded, simulated
from benchmarks.proofs.ptxsim import OutOfBoundsFault
from fastjepa_kernels import implementations
from tests.support.compiled_kernels import needs_compiler

pytestmark = needs_compiler


@triton.jit
def scale_kernel(p_in, p_out, n, factor, BLOCK: tl.constexpr):
    o_block = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_block = o_block < n
    tl.store(p_out + o_block, tl.load(p_in + o_block, mask=m_block) * factor, mask=m_block)


@triton.autotune(
    configs=[triton.Config({"BLOCK": block}, num_warps=warps) for block, warps in ((128, 1), (256, 2), (512, 4))],
    key=["n"],
    prune_configs_by={
        "early_config_prune": lambda configs, args, **kwargs: [c for c in configs if c.kwargs["BLOCK"] <= args["n"]]
    },
)
@triton.jit
def tuned_kernel(p_in, p_out, n, BLOCK: tl.constexpr):
    o_block = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_block = o_block < n
    tl.store(p_out + o_block, tl.load(p_in + o_block, mask=m_block), mask=m_block)


def scale(x: torch.Tensor, n: int | None = None, *, block: int = 128) -> torch.Tensor:
    out = torch.full_like(x, torch.nan)
    n = x.numel() if n is None else n
    scale_kernel[lambda meta: (triton.cdiv(n, meta["BLOCK"]),)](x, out, n, 2.0, BLOCK=block)
    return out


def tuned(x: torch.Tensor) -> torch.Tensor:
    out = torch.full_like(x, torch.nan)
    tuned_kernel[lambda meta: (triton.cdiv(x.numel(), meta["BLOCK"]),)](x, out, x.numel())
    return out


def only(launches: list[Launch]) -> Launch:
    (launch,) = launches
    return launch


def test_a_launch_is_recorded_with_its_grid_and_arguments_and_not_run() -> None:
    x = torch.ones(1000)
    with recorded("sm_80") as launches:
        out = scale(x)
    launch = only(launches)
    assert (launch.name, launch.grid, launch.config) == ("scale_kernel", (8, 1, 1), None)
    assert launch.constexprs == {"BLOCK": 128}
    assert list(launch.arguments) == ["p_in", "p_out", "n", "factor"]
    assert launch.arguments["p_in"] is x
    assert (launch.arguments["n"], launch.arguments["factor"]) == (1000, 2.0)
    assert out.isnan().all()


def test_launches_are_counted_by_kernel_and_not_run() -> None:
    x = torch.ones(1000)
    with counted() as launches:
        out = [scale(x), tuned(x), scale(x)]
    assert launches == {"scale_kernel": 2, "tuned_kernel": 1}
    assert all(y.isnan().all() for y in out)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_a_launch_is_compiled_for_the_target(target: str) -> None:
    with recorded(target) as launches:
        scale(torch.ones(64))
    assert f".target {target}" in only(launches).kernel.asm["ptx"]


def test_an_amd_launch_is_compiled_for_the_target() -> None:
    assert (parse_target("gfx942").backend, parse_target("gfx942").warp_size) == ("hip", 64)
    with recorded("gfx942") as launches:
        scale(torch.ones(64))
    assert "gfx942" in only(launches).kernel.asm["amdgcn"]


def test_targets_do_not_share_compiled_kernels() -> None:
    for target in ("sm_80", "sm_90", "sm_80"):
        with recorded(target) as launches:
            scale(torch.ones(64))
        assert f".target {target}" in only(launches).kernel.asm["ptx"]


def test_arguments_are_specialised_as_the_jit_does() -> None:
    def loads(n: int, offset: int = 0) -> tuple[str, list[str]]:
        with recorded("sm_80") as launches:
            scale(torch.ones(2048 + offset)[offset:], n, block=1024)
        launch = only(launches)
        assert launch.kernel.src.signature["p_in"] == "*fp32"
        return launch.kernel.asm["ptx"], list(launch.arguments)

    divisible, arguments = loads(1024)
    assert "ld.global.v4.b32" in divisible
    assert arguments == ["p_in", "p_out", "n", "factor"]
    for ptx, arguments in (
        loads(1023),
        loads(1024, offset=1),
    ):  # the mask, or the address, allows only accesses of one element
        assert "ld.global.b32" in ptx
        assert "ld.global.v4" not in ptx
        assert arguments == ["p_in", "p_out", "n", "factor"]
    _, arguments = loads(1)
    assert arguments == ["p_in", "p_out", "factor"]  # the integer 1 becomes a constant


def test_an_autotuned_kernel_is_recorded_with_one_or_all_of_its_configurations() -> None:
    x = torch.ones(1024)
    with recorded("sm_80") as launches:
        tuned(x)
    assert only(launches).grid == (8, 1, 1)
    with recorded("sm_80", all_configs=True) as launches:
        tuned(x)
    assert [launch.grid[0] for launch in launches] == [8, 4, 2]
    assert [launch.constexprs["BLOCK"] for launch in launches] == [128, 256, 512]
    assert [launch.kernel.metadata.num_warps for launch in launches] == [1, 2, 4]
    assert [launch.config and launch.config.kwargs["BLOCK"] for launch in launches] == [128, 256, 512]
    with recorded("sm_80", all_configs=True) as launches:
        tuned(torch.ones(300))
    assert [launch.constexprs["BLOCK"] for launch in launches] == [128, 256]  # those left after pruning


@pytest.mark.parametrize("config", [0, 1, 2, 4])
def test_any_configuration_can_be_simulated(config: int) -> None:
    x = torch.randn(1000)
    with simulated("sm_90", config=config) as counts:
        assert torch.equal(tuned(x), x)
    assert counts[0]["by_class"]["ret"] == {0: 8, 1: 4 * 2, 2: 2 * 4, 4: 4 * 2}[config]  # programs x warps


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_simulated_launches_compute_and_are_counted_one_by_one(target: str) -> None:
    x = torch.randn(512)
    with simulated(target) as counts:
        assert torch.equal(scale(x), 2 * x)
        assert torch.equal(scale(x, 1)[:1], 2 * x[:1])  # n = 1 becomes a constant
    assert [count["useful_bytes"] for count in counts] == [{"load": 2048, "store": 2048}, {"load": 4, "store": 4}]


def test_a_fault_in_a_simulated_launch_is_raised_where_it_is_launched() -> None:
    with pytest.raises(OutOfBoundsFault), simulated("sm_80"):
        scale(torch.ones(100), 128)


def _patched() -> tuple[Any, ...]:
    triton_problem = implementations("mask_sampling", "cpu", torch.int64)["triton"]
    return JITFunction.run, Autotuner.run, driver._active, triton_problem


@pytest.mark.parametrize(
    "catch", [recorded, simulated, lambda target: caught(target, lambda launch: None), lambda target: counted()]
)
def test_nothing_stays_patched(catch: Callable[[str], AbstractContextManager[Any]]) -> None:
    before = _patched()
    with catch("sm_80"):
        assert _patched() != before
    assert _patched() == before
    with pytest.raises(KeyError, match="from within"), catch("sm_80"):
        raise KeyError("from within")
    assert _patched() == before


def test_a_launch_that_fails_leaves_no_configuration_behind() -> None:
    def refuse(launch: Launch) -> None:
        raise ValueError(launch.name)

    with caught("sm_80", refuse), pytest.raises(ValueError, match="tuned_kernel"):
        tuned(torch.ones(512))
    with recorded("sm_80") as launches:
        scale(torch.ones(64))
    assert only(launches).config is None


def test_catches_can_be_nested() -> None:
    with recorded("sm_80") as outer:
        scale(torch.ones(64))
        with recorded("sm_90") as inner:
            scale(torch.ones(64))
        scale(torch.ones(64))
    assert (len(outer), len(inner)) == (2, 1)
    assert ".target sm_90" in only(inner).kernel.asm["ptx"]
    assert all(".target sm_80" in launch.kernel.asm["ptx"] for launch in outer)
