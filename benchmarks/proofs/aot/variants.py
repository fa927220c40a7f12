"""The variants of the kernels: compile every launch of the cases, and check each variant against the limits."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path

import torch
from triton.errors import TritonError
from triton.runtime.jit import JITFunction, KernelInterface

from benchmarks.proofs.aot.cases import Case, all_cases
from benchmarks.proofs.aot.compiled import Compilations, Compiled, analyse
from benchmarks.proofs.aot.launches import Launch, caught
from benchmarks.proofs.aot.limits import bounds_of, broken_limits, limits_of
from benchmarks.proofs.aot.overflow import overflows

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


@dataclass
class Variant:
    """One kernel as one launch specialised it, in one configuration, for one target."""

    op: str
    compiled: Compiled
    specialisation: str
    config: str
    half: bool
    """True if it reads or writes bf16 or fp16."""
    cases: set[str] = field(default_factory=set)
    """The cases that launch it, as "case, forward" or "case, backward"."""
    overflows: tuple[str, ...] = ()
    """Operations whose integers may overflow 32 bits."""

    @property
    def kernel(self) -> str:
        """The operation and the kernel: kernels of different operations may share a name."""
        return f"{self.op}.{self.compiled.kernel}"

    @property
    def name(self) -> str:
        return f"{self.kernel}[{self.specialisation}] {self.config} {self.compiled.target}"

    def broken(self) -> list[str]:
        """The limits that it breaks."""
        try:
            limits = limits_of(f"{self.kernel} {self.specialisation}", self.compiled.target)
        except LookupError as error:
            return [str(error)]
        return broken_limits(self.compiled, limits, half=self.half)


@dataclass(frozen=True)
class Failure:
    """A case that could not be compiled for a target, and why."""

    case: str
    target: str
    error: str


@dataclass
class Report:
    """All variants, with the cases that they come from."""

    variants: list[Variant]
    failures: list[Failure]
    cases: list[Case]

    def broken(self) -> list[str]:
        """Broken limits, overflows, failures to compile, and kernels that no case launches."""
        found = [f"{variant.name}: {limit}" for variant in self.variants for limit in variant.broken()]
        found += sorted({f"{v.kernel} may overflow 32 bits: {x}" for v in self.variants for x in v.overflows})
        found += [f"{failure.case} for {failure.target}: {failure.error}" for failure in self.failures]
        known = {variant.kernel for variant in self.variants}
        kernels = [kernel for op in {case.op for case in self.cases} for kernel in launched_kernels(op)]
        return found + [f"{kernel}: no case launches it" for kernel in sorted(set(kernels) - known)]


def launched_kernels(op: str) -> Iterator[str]:
    """The kernels that the source of an operation launches as `kernel[grid](...)`."""
    module = import_module(f"fastjepa_kernels.triton_kernels.{op}")
    assert module.__file__
    calls = (node.func for node in ast.walk(ast.parse(Path(module.__file__).read_text())) if isinstance(node, ast.Call))
    names = {ast.unparse(function.value) for function in calls if isinstance(function, ast.Subscript)}
    for kernel in (getattr(module, name, None) for name in sorted(names)):
        if isinstance(kernel, KernelInterface):
            while not isinstance(kernel, JITFunction):  # unwrap autotuners; several may wrap one kernel
                kernel = kernel.fn
            yield f"{op}.{kernel.fn.__name__}"


def select(ops: Sequence[str] | None = None) -> list[Case]:
    """The cases of these operations (None: of all)."""
    return [case for case in all_cases() if ops is None or case.op in ops]


def compile_all(cases: Iterable[Case], targets: Sequence[str], *, all_configs: Sequence[str], jobs: int) -> Report:
    """Compile every launch of the cases for every target. Identical launches are compiled once.

    Args:
        cases: some of `all_cases()`.
        targets: some of `TARGETS`.
        all_configs: targets for which every configuration of an autotuned kernel is compiled, not only the first.
        jobs: number of processes; 1 uses this one.
    """
    cases = list(cases)
    tasks = [(case.label, target, target in all_configs) for case in cases for target in targets]
    variants: dict[tuple[str, str, str], Variant] = {}
    failures: list[Failure] = []
    for result in _run(tasks, jobs):
        if isinstance(result, Failure):
            failures.append(result)
            continue
        for key, variant in result.items():
            variants.setdefault(key, variant).cases.update(variant.cases)
    return Report(list(variants.values()), failures, cases)


_Found = dict[tuple[str, str, str], Variant]


def _run(tasks: list[tuple[str, str, bool]], jobs: int) -> Iterator[_Found | Failure]:
    all_cases()
    if jobs == 1:
        yield from map(_compile_case, tasks)
        return
    with ProcessPoolExecutor(jobs, get_context("fork"), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield from pool.map(_compile_case, tasks)


def _compile_case(task: tuple[str, str, bool]) -> _Found | Failure:
    label, target, all_configs = task
    case = next(case for case in all_cases() if case.label == label)
    compilations, launches = Compilations(), list[tuple[str, Launch]]()
    phase = "forward"
    try:
        with compilations.watched(), caught(target, lambda x: launches.append((phase, x)), all_configs=all_configs):
            result = case.run()
            if case.backward is not None:
                assert result is not None, f"{label} has a backward pass, but its result is None"
                phase = "backward"
                result.backward(torch.empty_like(result))
    except (TritonError, RuntimeError) as error:
        return Failure(label, target, str(error).partition("Repro command")[0].strip())
    assert launches, f"{label} launches no kernel"
    found: _Found = {}
    for phase, launch in launches:
        variant = _variant(case, launch, target, compilations)
        key = (variant.name, launch.kernel.hash, target)
        found.setdefault(key, variant).cases.add(f"{label}, {phase}")
    return found


def _variant(case: Case, launch: Launch, target: str, compilations: Compilations) -> Variant:
    config = launch.config.all_kwargs() if launch.config is not None else {}
    types = sorted({_type(x) for x in launch.arguments.values() if isinstance(x, torch.Tensor)})
    constants = [
        f"{name}={str(value).lower()}"
        for name, value in launch.constexprs.items()
        if name not in config and (value is None or isinstance(value, int | str))
    ]
    tiles = [f"{name}={value}" for name, value in config.items() if name in launch.constexprs]
    tiles += [f"num_warps={launch.kernel.metadata.num_warps}"]
    if config:
        tiles += [f"num_stages={launch.kernel.metadata.num_stages}"]
    return Variant(
        op=case.op,
        compiled=analyse(launch.kernel, target, compilations.facts(launch.kernel)),
        specialisation=" ".join(types + constants),
        config=" ".join(tiles),
        half=bool({"bfloat16", "float16"} & set(types)),
        overflows=_overflows(f"{case.op}.{launch.name}", launch.kernel.asm["ttir"]),
    )


def _type(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


@cache
def _overflows(kernel: str, ttir: str) -> tuple[str, ...]:
    return tuple(str(overflow) for overflow in overflows(ttir, bounds_of(kernel)))
