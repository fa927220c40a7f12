"""A contest: one computation, several providers, the same inputs; who gives a wrong answer is not timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

import fastjepa_kernels
from benchmarks.kernel_cases import Work
from fastjepa.profiling.timing import Timed, nothing

Outputs = Tensor | tuple[Tensor, ...]

# Relative error (of norms) that a provider may have, by the precision it computes in.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 5e-3, torch.int64: 0.0}


# What a provider raises that cannot do a contest; ValueError for one of ours, the others are PyTorch's and its rivals'.
FAILURES = (RuntimeError, ValueError, NotImplementedError)


def describe(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"


@dataclass(frozen=True)
class _Candidate:
    build: Callable[[], Callable[[], Outputs]]
    prepare: Callable[[], None]
    is_ours: bool


@dataclass
class Providers:
    """Who takes part by name, and who cannot, with the reason."""

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
        """Every implementation of one of our operations; `build` gives the function to time, from the public ones."""
        for name, problem in fastjepa_kernels.implementations(op, device.type, dtype, head_dim).items():

            def ask(name: str = name) -> None:
                fastjepa_kernels.request({op: name})
                fastjepa_kernels.choose(op, device.type, dtype, head_dim)  # remembered, so that it is not timed

            self._add(f"fastjepa {name}", problem, _Candidate(build, ask, is_ours=True))

    def add(self, name: str, build: Callable[[], Callable[[], Outputs]], problem: str | None = None) -> None:
        """A rival; `problem` is why it is known not to run here."""
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
    """forward, backward, ..."""
    shape: str
    dtype: torch.dtype
    work: Work
    expected: tuple[Tensor, ...]
    """The right outputs, in a precision above the providers'."""
    providers: Providers

    @property
    def title(self) -> str:
        return f"{self.op}, {self.part}, {self.shape}"

    def contestants(self, *, ours_only: bool = False) -> tuple[dict[str, Timed], dict[str, str]]:
        """Those whose answer is right, ready to run; and why the others do not take part."""
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
        """Why its outputs are not the expected ones."""
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
