"""Run the same tests with every engine that carries out Triton kernels.

`TRITON_INTERPRET=1 python -m pytest tests/kernels/triton` uses Triton's interpreter. That needs a process of its own, since
Triton reads the variable when it is imported. Without the variable, the kernels are compiled for sm_80 and sm_90, and their
PTX runs in the simulator, benchmarks.proofs.ptxsim; with `-m gpu` they run on the GPU.

Cases that an engine does not run (`only_cases` and the marks made with it) are deselected when they are collected.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from fastjepa_kernels.selection import emulated_triton

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True)
class Engine:
    """An engine that carries out kernels, and the device on which its tensors lie."""

    name: str
    device: torch.device

    @property
    def thorough(self) -> bool:
        """False for the simulator, which is slow: a test then runs a case or two of each kind."""
        return not _simulates(self.name)


def _simulates(engine: str) -> bool:
    return engine.startswith("sm_")


def only_cases(wanted: Callable[..., bool]) -> pytest.MarkDecorator:
    """Run only those cases of a test for which `wanted` is true.

    Args:
        wanted: a function of any of the test's parameters, under their names; `engine` is the name of the engine.
    """
    return pytest.mark.only_cases(wanted=wanted)  # by name: a mark that is called with a function alone decorates it


def simulator_runs(wanted: Callable[..., bool]) -> pytest.MarkDecorator:
    """Keep the cases for which `wanted` is true where the slow simulator runs them; the other engines run all.

    Args:
        wanted: a function of any of the test's parameters, under their names.
    """
    return pytest.mark.simulator_runs(wanted=wanted)


compiled_only = only_cases(lambda: not INTERPRETED)
interpreted_only = only_cases(lambda: INTERPRETED)
not_in_the_simulator = simulator_runs(lambda: False)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "engine" in metafunc.fixturenames:
        names = ["interpreter"] if INTERPRETED else ["sm_80", "sm_90"]
        engines: list[Any] = [*names]
        if not INTERPRETED and metafunc.config.option.markexpr.startswith("gpu"):  # otherwise no GPU is seen
            engines.append(pytest.param("cuda", marks=pytest.mark.gpu))
        metafunc.parametrize("engine", engines, indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the cases that the marks above leave out."""
    kept = [item for item in items if _is_wanted(item)]
    if left_out := set(items).difference(kept):
        config.hook.pytest_deselected(items=[item for item in items if item in left_out])
        items[:] = kept


def _is_wanted(item: pytest.Item) -> bool:
    case = item.callspec.params if hasattr(item, "callspec") else {}
    wanted = [mark.kwargs["wanted"] for mark in item.iter_markers("only_cases")]
    if _simulates(case.get("engine", "")):
        wanted += [mark.kwargs["wanted"] for mark in item.iter_markers("simulator_runs")]
    return all(function(**{name: case[name] for name in inspect.signature(function).parameters}) for function in wanted)


@pytest.fixture
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    name: str = request.param
    if name == "cuda":
        yield Engine(name, torch.device("cuda"))
        return
    emulation: AbstractContextManager[object]
    if name == "interpreter":
        from tests.support import bf16_interpreter

        bf16_interpreter.install()
        emulation = emulated_triton()
    else:
        from benchmarks.proofs.aot.launches import simulated

        emulation = simulated(name)
    with emulation:
        yield Engine(name, torch.device("cpu"))


@pytest.fixture
def unwritten_memory_shows() -> Iterator[None]:
    """Fill the result of torch.empty with NaN, or the largest integer, instead of what the last tensor left there."""
    torch.use_deterministic_algorithms(True)  # fills new memory, see torch.utils.deterministic
    assert torch.empty(1).isnan().all()
    assert int(torch.empty(1, dtype=torch.int32)) == 2**31 - 1
    yield
    torch.use_deterministic_algorithms(False)


class IdleKernel:
    """A stand-in for a kernel that does nothing."""

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, **kwargs: None
