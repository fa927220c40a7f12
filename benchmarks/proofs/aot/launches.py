"""Catch Triton launches on a machine without a GPU: what a launcher passes is what gets compiled, recorded or simulated.

The launchers of fastjepa_kernels are called as on a GPU, with CPU tensors. Every launch is compiled for the target with the
specialisation that the JIT derives from its arguments (types, divisibility), so a report cannot drift from the code.
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

_RUN = JITFunction.run  # as it is outside of all catches, which may be nested


def parse_target(name: str) -> GPUTarget:
    """ "sm_90" or "gfx942" as Triton's target."""
    if name.startswith("sm_"):
        return GPUTarget("cuda", int(name.removeprefix("sm_")), 32)
    return GPUTarget("hip", name, 64)


@dataclass(frozen=True)
class Launch:
    """One launch of a compiled kernel."""

    kernel: Any
    """triton.compiler.CompiledKernel."""
    name: str
    grid: tuple[int, int, int]
    arguments: dict[str, Any]
    """What is passed at run time (not the constexprs), in order."""
    constexprs: dict[str, Any]
    config: Config | None
    """The autotuner's choice, where there is one."""


class _Driver:
    """What the JIT asks a driver for when it compiles; nothing is ever loaded."""

    def __init__(self, target: str) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return parse_target(self.target)

    def get_current_device(self) -> str:
        return self.target  # the key of the JIT's cache: one for each target

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_device_interface(self) -> Any:
        raise RuntimeError("a launch was to be timed without a GPU")


@contextmanager
def caught(
    target: str, on_launch: Callable[[Launch], None], *, all_configs: bool = False, config: int = 0
) -> Iterator[None]:
    """Inside, Triton kernels take CPU tensors, and every launch is compiled for `target` and handed to `on_launch`.

    Args:
        target: "sm_80", "sm_90", "sm_100", "gfx942", ...
        on_launch: called in place of the launch.
        all_configs: call it for every configuration of an autotuned kernel; else for one of them.
        config: which one: an index into the (pruned) configurations, modulo their number.
    """
    outside = JITFunction.run, Autotuner.run
    active = driver._active
    chosen: list[Config | None] = [None]  # by the autotuner around the launch, innermost last

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
    """The launches made inside, compiled and not carried out: outputs hold whatever `torch.empty` left there."""
    launches: list[Launch] = []
    with caught(target, launches.append, all_configs=all_configs):
        yield launches


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """How often each kernel is launched inside. Nothing is compiled or carried out, as for `recorded`, but it is quick."""
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
    """Have benchmarks.proofs.ptxsim run the launches on CPU tensors; yields its counts, one entry per launch."""
    from benchmarks.proofs import ptxsim

    counts: list[Any] = []

    def simulate(launch: Launch) -> None:
        counts.append(ptxsim.launch(launch.kernel, launch.grid, list(launch.arguments.values())).summary())

    with caught(target, simulate, config=config):
        yield counts
