"""The list of operations, and the choice of the implementation that runs each of them.

Every operation has implementations in order of preference (`OPERATIONS`). The first one that can take the input runs, unless
another one is requested: by the environment variable FASTJEPA_KERNELS, or else by `request` (the trainer's `kernels`
settings). The choice is made once for each operation, device type, dtype and head dim, and is logged once with its reason.
"""

from __future__ import annotations

import logging
import os
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple

import torch

logger = logging.getLogger(__name__)

ENVIRONMENT_VARIABLE = "FASTJEPA_KERNELS"


class Operation(NamedTuple):
    """An operation as a run uses it: all that the choice of its implementation depends on, but for the device."""

    name: str
    """A key of `OPERATIONS`."""
    dtype: torch.dtype
    """The dtype of its first input: of the weights for adamw_ema, int64 (the sample indices) for mask_sampling."""
    head_dim: int = 0
    """The width of a head for block_attention; 0 for the other operations."""

    def choose(self, device_type: str) -> str:
        """The name of the implementation that runs on such devices; see the function `choose`."""
        return choose(self.name, device_type, self.dtype, self.head_dim)

    def implementations(self, device_type: str) -> dict[str, str | None]:
        """The implementations and why they cannot run on such devices; see the function `implementations`."""
        return implementations(self.name, device_type, self.dtype, self.head_dim)


_requested: dict[str, str] = {}
_requests_apply = True
_emulated = False


@contextmanager
def emulated_triton() -> Iterator[None]:
    """Let Triton kernels take CPU tensors inside the block, where something other than a GPU carries out their launches.

    This is for tests and reports, which interpret, simulate or record the launches. No training run uses it.
    """
    global _emulated
    before, _emulated = _emulated, True
    _choose.cache_clear()
    try:
        yield
    finally:
        _emulated = before
        _choose.cache_clear()


@contextmanager
def without_requests() -> Iterator[None]:
    """Ignore the requested implementations inside the block.

    This is for work beside a run, in a precision for which the requests were not made: evaluation, reports.
    """
    global _requests_apply
    before, _requests_apply = _requests_apply, False
    _choose.cache_clear()
    try:
        yield
    finally:
        _requests_apply = before
        _choose.cache_clear()


@cache
def triton_problem() -> str | None:
    """Why Triton cannot launch kernels on the GPU, or None. On a new machine it first compiles a part of itself from C."""
    if find_spec("triton") is None:
        return "triton is not installed"
    from triton.runtime import driver

    try:
        driver.active.get_current_target()
    except (RuntimeError, OSError, AssertionError, subprocess.SubprocessError) as error:
        # The command line of a compiler that failed is long, and the compiler has printed the rest itself.
        reason = f"{error.cmd[0]} fails" if isinstance(error, subprocess.CalledProcessError) else str(error).strip()
        return f"triton needs a C compiler (gcc, clang or $CC), Python's headers and libcuda: {reason}"
    return None


def _triton_problem(operation: Operation, device_type: str) -> str | None:
    if _emulated:
        return None
    if device_type != "cuda":
        return f"it needs a CUDA device, not {device_type}"
    if torch.cuda.get_device_capability() < (8, 0):
        return "it needs compute capability 8.0 or newer"
    return triton_problem()


def _triton_float_problem(operation: Operation, device_type: str) -> str | None:
    if operation.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"it does not take {operation.dtype}"
    return _triton_problem(operation, device_type)


def _triton_attention_problem(operation: Operation, device_type: str) -> str | None:
    if operation.head_dim % 8 or operation.head_dim > 128:
        return f"head dim {operation.head_dim} is not a multiple of 8 up to 128"
    return _triton_float_problem(operation, device_type)


def _flash_problem(operation: Operation, device_type: str) -> str | None:
    if device_type != "cuda" or torch.cuda.get_device_capability() < (8, 0):
        return "it needs a CUDA device of compute capability 8.0 or newer"
    if operation.dtype not in (torch.float16, torch.bfloat16):
        return f"it takes half precision, not {operation.dtype}"
    if operation.head_dim % 8 or operation.head_dim > 256:
        return f"head dim {operation.head_dim} is not a multiple of 8 up to 256"
    return None


def _xformers_problem(operation: Operation, device_type: str) -> str | None:
    return "xformers is not installed" if find_spec("xformers") is None else _flash_problem(operation, device_type)


def _host_lengths_problem(operation: Operation, device_type: str) -> str | None:
    return None if device_type == "cpu" else "it reads the lengths on the host"


@cache
def apex_problem() -> str | None:
    """Why NVIDIA apex cannot be used here, or None. The package named apex on PyPI is another project."""
    if find_spec("apex") is None:
        return "NVIDIA apex is not installed"
    if find_spec("apex.optimizers") is None:
        return "the installed apex is not NVIDIA's (PyPI's is a Pyramid toolkit): build NVIDIA's from source"
    try:
        import_module("amp_C")
    except ImportError as error:
        return f"apex is installed without its CUDA extension ({error})"
    return None


def _apex_problem(operation: Operation, device_type: str) -> str | None:
    if device_type != "cuda":
        return f"it needs a CUDA device, not {device_type}"
    return apex_problem()


def _onednn_problem(operation: Operation, device_type: str) -> str | None:
    if device_type != "cpu" or operation.dtype != torch.float32:
        return f"it is for float32 on a CPU, not {operation.dtype} on {device_type}"
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return "this PyTorch has no oneDNN"
    capability = torch.backends.cpu.get_cpu_capability()
    return None if capability == "AVX512" else f"it is faster than MKL with AVX-512 only; this CPU has {capability}"


def _always_runs(operation: Operation, device_type: str) -> None:
    return None


# Implementations by operation, in order of preference, each with the function that says why it cannot take an input. Triton
# stands first; the others are PyTorch's own and those of packages that a user may have installed.
_PROBLEMS: dict[str, dict[str, Callable[[Operation, str], str | None]]] = {
    "masked_gather": {"triton": _triton_float_problem, "torch": _always_runs},
    "block_attention": {
        "triton": _triton_attention_problem,
        "varlen": _flash_problem,
        "buckets": _host_lengths_problem,
        "padded": _always_runs,
        "xformers": _xformers_problem,
    },
    "adamw_ema": {"triton": _triton_float_problem, "torch": _always_runs, "apex": _apex_problem},
    "mask_sampling": {"triton": _triton_problem, "torch": _always_runs},
    "target_loss": {"triton": _triton_float_problem, "torch": _always_runs},
    "linear": {"onednn": _onednn_problem, "torch": _always_runs},
}

OPERATIONS: dict[str, tuple[str, ...]] = {name: tuple(problems) for name, problems in _PROBLEMS.items()}
"""The operations by name, each with the names of its implementations in order of preference."""
TRITON_OPERATIONS = tuple(name for name, names in OPERATIONS.items() if "triton" in names)


def request(requests: Mapping[str, str]) -> None:
    """Ask for implementations by operation; "auto", or an operation left out, means the first one that can run.

    Raises:
        ValueError: an operation or implementation is unknown. Whether a requested one can run is known at the first call.
    """
    _check("kernels", requests)
    _requested.clear()
    _requested.update(requests)
    _choose.cache_clear()


def _check(where: str, requests: Mapping[str, str]) -> None:
    for op, name in requests.items():
        if op not in OPERATIONS:
            raise ValueError(f"{where}: unknown operation {op!r}, expected one of {', '.join(OPERATIONS)}")
        if name != "auto" and name not in OPERATIONS[op]:
            raise ValueError(f"{where}: {op} = {name!r}, expected auto or one of {', '.join(OPERATIONS[op])}")


def _request_for(op: str) -> tuple[str, str]:
    """The implementation that is requested, or "auto", and the name of the variable or setting that requests it."""
    if not _requests_apply:
        return "auto", ""
    text = os.environ.get(ENVIRONMENT_VARIABLE, "")
    entries = [entry.strip() for entry in text.split(",") if entry.strip()]
    if any(entry.count("=") != 1 for entry in entries):
        raise ValueError(f"{ENVIRONMENT_VARIABLE}={text}: expected operation=implementation[,...]")
    requests = dict(entry.split("=") for entry in entries)
    _check(f"{ENVIRONMENT_VARIABLE}={text}", requests)
    if op in requests:
        return requests[op], ENVIRONMENT_VARIABLE
    return _requested.get(op, "auto"), f"kernels.{op}"


def implementations(op: str, device_type: str, dtype: torch.dtype, head_dim: int = 0) -> dict[str, str | None]:
    """The implementations of `op` in order of preference, each with the reason why it cannot take such inputs, or None."""
    operation = Operation(op, dtype, head_dim)
    return {name: problem(operation, device_type) for name, problem in _PROBLEMS[op].items()}


def choose(op: str, device_type: str, dtype: torch.dtype, head_dim: int = 0) -> str:
    """The name of the implementation of `op` that runs for such inputs.

    Raises:
        ValueError: the requested one cannot take them; the message lists those that can.
    """
    return _choose(op, device_type, dtype, head_dim)


# The compiler takes the result as a constant; else the logging would break its graph. torch.compiler.assume_constant_result
# sets the same mark, but imports the compiler, which takes a second of every start.
choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _choose(op: str, device_type: str, dtype: torch.dtype, head_dim: int) -> str:
    problems = implementations(op, device_type, dtype, head_dim)
    requested, source = _request_for(op)
    kind = f"{dtype} on {device_type}" + (f", head dim {head_dim}" if head_dim else "")
    if requested != "auto" and problems[requested]:
        available = ", ".join(name for name, problem in problems.items() if not problem)
        raise ValueError(
            f"{source}: {op} = {requested} cannot run for {kind}: {problems[requested]}; available: {available}"
        )
    name = next(name for name, problem in problems.items() if not problem) if requested == "auto" else requested
    passed_over = [f"{n}: {p}" for n, p in list(problems.items())[: list(problems).index(name)] if p]
    reason = source if requested != "auto" else "; ".join(passed_over) or "the first choice"
    logger.info("%s for %s: %s (%s)", op, kind, name, reason)
    return name
