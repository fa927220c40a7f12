"""Run the same tests with every engine that carries out Triton kernels.

`TRITON_INTERPRET=1 python -m pytest tests/kernels/triton` uses Triton's interpreter. That needs a process of its own, since
Triton reads the variable when it is imported. Without the variable, the kernels are compiled for sm_80 and sm_90, and their
PTX runs in the simulator, benchmarks.proofs.ptxsim; with `-m gpu` they run on the GPU.
"""

from __future__ import annotations

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
        return not self.name.startswith("sm_")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "engine" in metafunc.fixturenames:
        names = ["interpreter"] if INTERPRETED else ["sm_80", "sm_90", pytest.param("cuda", marks=pytest.mark.gpu)]
        metafunc.parametrize("engine", names, indirect=True)


@pytest.fixture
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    name: str = request.param
    if name == "cuda":
        yield Engine(name, torch.device("cuda"))
        return
    emulation: AbstractContextManager[object]
    if name == "interpreter":
        from tests.kernels.triton import bf16_interpreter

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
