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


@dataclass
class Providers:
    """Who takes part by name, and who cannot, with the reason."""

    present: dict[str, Timed] = field(default_factory=dict)
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
            if problem:
                self.absent[f"fastjepa {name}"] = problem
                continue

            def ask(name: str = name) -> None:
                fastjepa_kernels.request({op: name})
                fastjepa_kernels.choose(op, device.type, dtype, head_dim)  # remembered, so that it is not timed

            ask()
            self.add(f"fastjepa {name}", build, prepare=ask)
        fastjepa_kernels.request({})

    def add(
        self,
        name: str,
        build: Callable[[], Callable[[], Outputs]],
        problem: str | None = None,
        *,
        prepare: Callable[[], None] = nothing,
    ) -> None:
        """A provider; `problem` is why it is known not to run here. One that fails when it is built is absent too."""
        if problem is None:
            try:
                self.present[name] = Timed(build(), prepare)
            except FAILURES as error:
                problem = describe(error)
        if problem:
            self.absent[name] = problem


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

    def wrong(self) -> dict[str, str]:
        """The providers that fail or whose outputs are not the expected ones, and how."""
        return {name: problem for name, timed in self.providers.present.items() if (problem := self._problem(timed))}

    def _problem(self, timed: Timed) -> str | None:
        timed.prepare()
        try:
            outputs = timed.run()
        except FAILURES as error:
            return describe(error)
        assert isinstance(outputs, Tensor | tuple)
        for index, (mine, right) in enumerate(zip(_as_tuple(outputs), self.expected, strict=True)):
            mine = mine.to(right.device)
            difference = (mine.to(right.dtype) - right).double().norm()
            relative = (difference / right.double().norm().clamp_min(1e-30)).item()
            if not relative <= TOLERANCE[self.dtype]:
                return f"output {index}: relative error {relative:.1e} is above {TOLERANCE[self.dtype]:.0e}"
        return None


def _as_tuple(outputs: Outputs) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)
