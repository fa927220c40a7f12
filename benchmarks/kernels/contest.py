"""A contest: several providers of one computation get the same inputs; those with a wrong answer are not timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

import fastjepa_kernels
from benchmarks.kernel_cases import Work
from fastjepa.profiling.timing import Timed, nothing

Outputs = Tensor | tuple[Tensor, ...]

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 5e-3, torch.int64: 0.0}
"""Largest relative error of an output, by norm, for each dtype that a provider computes in."""

FAILURES = (RuntimeError, ValueError, NotImplementedError)
"""Errors by which a provider says that it cannot do a contest: ValueError is fastjepa's, the others are PyTorch's and of
other packages."""


def describe(error: Exception) -> str:
    """The error's class and the first line of its message."""
    return f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"


@dataclass(frozen=True)
class _Candidate:
    build: Callable[[], Callable[[], Outputs]]
    """Makes the function to time."""
    prepare: Callable[[], None]
    """Runs before `build` and before each timed call, outside of the clock."""
    is_ours: bool


@dataclass
class Providers:
    """The providers of a contest by name, and the reasons why others cannot take part."""

    candidates: dict[str, _Candidate] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)

    def add_ours(
        self,
        op: str,
        build: Callable[[], Callable[[], Outputs]],
        device: torch.device,
        dtype: torch.dtype,
        head_dim: int = 0,
    ) -> None:
        """Add every implementation of an operation of fastjepa. `build` makes the function to time from public functions."""
        for name, problem in fastjepa_kernels.implementations(op, device.type, dtype, head_dim).items():

            def select(name: str = name) -> None:
                fastjepa_kernels.request({op: name})
                # The choice is cached, so that choosing is not timed.
                fastjepa_kernels.choose(op, device.type, dtype, head_dim)

            self._add(f"fastjepa {name}", problem, _Candidate(build, select, is_ours=True))

    def add(self, name: str, build: Callable[[], Callable[[], Outputs]], problem: str | None = None) -> None:
        """Add another provider. `problem` says why it cannot run on this machine, or is None."""
        self._add(name, problem, _Candidate(build, nothing, is_ours=False))

    def _add(self, name: str, problem: str | None, candidate: _Candidate) -> None:
        if problem:
            self.absent[name] = problem
        else:
            self.candidates[name] = candidate


@dataclass(frozen=True)
class Contest:
    op: str
    part: str
    """Part of the operation: forward, backward, ..."""
    shape: str
    dtype: torch.dtype
    work: Work
    expected: tuple[Tensor, ...]
    """The right outputs, in a higher precision than the providers'."""
    providers: Providers

    @property
    def title(self) -> str:
        return f"{self.op}, {self.part}, {self.shape}"

    def contestants(self, *, ours_only: bool = False) -> tuple[dict[str, Timed], dict[str, str]]:
        """The providers whose answer is right, ready to run; and by name why the others do not take part."""
        right: dict[str, Timed] = {}
        missing = {name: why for name, why in self.providers.absent.items() if not ours_only}
        for name, candidate in self.providers.candidates.items():
            if ours_only and not candidate.is_ours:
                continue
            try:
                candidate.prepare()
                timed = Timed(candidate.build(), candidate.prepare)
                problem = self._problem(timed)
            except FAILURES as error:
                problem = describe(error)
            if problem:
                missing[name] = problem
            else:
                right[name] = timed
        return right, missing

    def _problem(self, timed: Timed) -> str | None:
        """The difference between the outputs and the expected ones, or None if they agree."""
        timed.prepare()
        outputs = timed.run()
        assert isinstance(outputs, Tensor | tuple)
        shapes = [[tuple(x.shape) for x in tensors] for tensors in (_as_tuple(outputs), self.expected)]
        if shapes[0] != shapes[1]:
            return f"outputs of shapes {shapes[0]}, expected {shapes[1]}"
        for index, (mine, right) in enumerate(zip(_as_tuple(outputs), self.expected, strict=True)):
            mine = mine.to(right.device)
            difference = (mine.to(right.dtype) - right).double().norm()
            relative = (difference / right.double().norm().clamp_min(1e-30)).item()
            if not relative <= TOLERANCE[self.dtype]:
                return f"output {index}: relative error {relative:.1e} is above {TOLERANCE[self.dtype]:.0e}"
        return None


def _as_tuple(outputs: Outputs) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)
