"""Catch Triton launches on a machine without a GPU, to compile, record, count or simulate them.

The launchers of fastjepa_kernels are called as on a GPU, with CPU tensors. Every launch is compiled for a target with the
specialisation that the JIT derives from its arguments (types, divisibility), so that a report cannot drift from the code.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.autotuner import Autotuner, Config
from triton.runtime.jit import JITFunction

from fastjepa_kernels.selection import emulated_triton

_RUN = JITFunction.run  # the original, even inside of nested catches


def parse_target(name: str) -> GPUTarget:
    """Triton's target for a name such as "sm_90" or "gfx942"."""
    if name.startswith("sm_"):
        return GPUTarget("cuda", int(name.removeprefix("sm_")), 32)
    return GPUTarget("hip", name, 64)


@dataclass(frozen=True)
class Launch:
    """One launch of a compiled kernel."""

    kernel: Any
    """A triton.compiler.CompiledKernel."""
    name: str
    grid: tuple[int, int, int]
    arguments: dict[str, Any]
    """Arguments that are passed at run time (not the constexprs), in order."""
    constexprs: dict[str, Any]
    config: Config | None
    """The autotuner's configuration; None for a kernel without an autotuner."""


class _Driver:
    """Answers what the JIT asks a driver when it compiles. Nothing is ever loaded."""

    def __init__(self, target: str) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return parse_target(self.target)

    def get_current_device(self) -> str:
        return self.target  # the key of the JIT's cache, so that targets do not share kernels

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_device_interface(self) -> Any:
        raise RuntimeError("a kernel cannot be timed: there is no GPU")


@contextmanager
def caught(
    target: str, on_launch: Callable[[Launch], None], *, all_configs: bool = False, config: int = 0
) -> Iterator[None]:
    """Let Triton kernels take CPU tensors inside; compile every launch for `target` and hand it to `on_launch`.

    Args:
        target: "sm_80", "sm_90", "sm_100", "gfx942", ...
        on_launch: called in place of the launch.
        all_configs: call it for every configuration of an autotuned kernel, not for one of them.
        config: which one that is: an index into the (pruned) configurations, modulo their number.
    """
    outside = JITFunction.run, Autotuner.run
    active = driver._active
    chosen: list[Config | None] = [None]  # configurations of the autotuners around the launch, innermost last

    def run_caught(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = _RUN(self, *args, grid=grid, warmup=True, **kwargs)
        binder = self.device_caches[target][-1]
        bound, _, _ = binder(*args, debug=False, **kwargs)
        grid = grid(bound) if callable(grid) else grid
        types = kernel.src.signature
        on_launch(
            Launch(
                kernel,
                self.fn.__name__,
                (*grid, 1, 1)[:3],
                {name: bound[name] for name in self.arg_names if types[name] != "constexpr"},
                {name: bound[name] for name in self.arg_names if types[name] == "constexpr"},
                chosen[-1],
            )
        )
        return kernel

    def tune_caught(self: Autotuner, *args: Any, **kwargs: Any) -> Any:
        self.nargs = dict(zip(self.arg_names, args, strict=False))
        configs: Sequence[Config] = self.prune_configs(kwargs)
        for option in configs if all_configs else [configs[config % len(configs)]]:
            chosen.append(option)
            try:
                result = self.fn.run(*args, **kwargs, **option.all_kwargs())
            finally:
                chosen.pop()
        return result

    JITFunction.run, Autotuner.run = run_caught, tune_caught
    driver.set_active(_Driver(target))
    try:
        with emulated_triton():
            yield
    finally:
        driver._active = active
        JITFunction.run, Autotuner.run = outside


@contextmanager
def recorded(target: str, *, all_configs: bool = False) -> Iterator[list[Launch]]:
    """Yield the launches made inside. They are compiled but not run, so outputs hold whatever `torch.empty` left there."""
    launches: list[Launch] = []
    with caught(target, launches.append, all_configs=all_configs):
        yield launches


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Yield how often each kernel is launched inside. Nothing is compiled or run, so this is quick."""
    launches: Counter[str] = Counter()
    outside = JITFunction.run, Autotuner.run

    def run_counted(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches[self.fn.__name__] += 1

    def tune_counted(self: Autotuner, *args: Any, **kwargs: Any) -> None:
        self.fn.run(*args, **kwargs)

    JITFunction.run, Autotuner.run = run_counted, tune_counted
    try:
        with emulated_triton():
            yield launches
    finally:
        JITFunction.run, Autotuner.run = outside


@contextmanager
def simulated(target: str, *, config: int = 0) -> Iterator[list[Any]]:
    """Run the launches made inside on CPU tensors by benchmarks.proofs.ptxsim. Yields its counts, one entry per launch."""
    from benchmarks.proofs import ptxsim

    counts: list[Any] = []

    def simulate(launch: Launch) -> None:
        counts.append(ptxsim.launch(launch.kernel, launch.grid, list(launch.arguments.values())).summary())

    with caught(target, simulate, config=config):
        yield counts
