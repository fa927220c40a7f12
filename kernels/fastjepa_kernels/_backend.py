"""Which implementation of an operation runs: decided once per kind of input, logged once with its reason.

Every operation has a list of implementations in order of preference. The first that can take the input runs, unless one
was asked for: by the environment variable FASTJEPA_KERNELS, or else by `request` (the trainer's `kernels` settings).
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


class Input(NamedTuple):
    """What a choice depends on."""

    device_type: str
    dtype: torch.dtype
    head_dim: int
    """Of attention; 0 for the other operations."""


_requested: dict[str, str] = {}
_wishes_count = True
_emulated = False


@contextmanager
def emulated_triton() -> Iterator[None]:
    """Let Triton kernels take CPU tensors: inside, something else than a GPU carries out their launches.

    For tests and reports, which interpret, simulate or record the launches. Never a user's path.
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
def no_wishes() -> Iterator[None]:
    """Inside, no implementation is asked for: for work beside a run, in a precision that the wishes were not made for."""
    global _wishes_count
    before, _wishes_count = _wishes_count, False
    _choose.cache_clear()
    try:
        yield
    finally:
        _wishes_count = before
        _choose.cache_clear()


@cache
def triton_problem() -> str | None:
    """Why Triton can start nothing on the GPU, or None. On a new machine it first compiles a part of itself, from C."""
    if find_spec("triton") is None:
        return "triton is not installed"
    from triton.runtime import driver

    try:
        driver.active.get_current_target()
    except (RuntimeError, OSError, AssertionError, subprocess.SubprocessError) as error:
        # Of a compiler that fails the command is long, and it has told the rest by itself.
        reason = f"{error.cmd[0]} fails" if isinstance(error, subprocess.CalledProcessError) else str(error).strip()
        return f"triton needs a C compiler (gcc, clang or $CC), Python's headers and libcuda: {reason}"
    return None


def _triton_problem(given: Input) -> str | None:
    if _emulated:
        return None
    if given.device_type != "cuda":
        return f"it needs a CUDA device, not {given.device_type}"
    if torch.cuda.get_device_capability() < (8, 0):
        return "it needs compute capability 8.0 or newer"
    return triton_problem()


def _triton_float_problem(given: Input) -> str | None:
    if given.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"it does not take {given.dtype}"
    return _triton_problem(given)


def _triton_attention_problem(given: Input) -> str | None:
    if given.head_dim % 8 or given.head_dim > 128:
        return f"head dim {given.head_dim} is not a multiple of 8 up to 128"
    return _triton_float_problem(given)


def _flash_problem(given: Input) -> str | None:
    if given.device_type != "cuda" or torch.cuda.get_device_capability() < (8, 0):
        return "it needs a CUDA device of compute capability 8.0 or newer"
    if given.dtype not in (torch.float16, torch.bfloat16):
        return f"it takes half precision, not {given.dtype}"
    if given.head_dim % 8 or given.head_dim > 256:
        return f"head dim {given.head_dim} is not a multiple of 8 up to 256"
    return None


def _xformers_problem(given: Input) -> str | None:
    return "xformers is not installed" if find_spec("xformers") is None else _flash_problem(given)


def _host_lengths_problem(given: Input) -> str | None:
    return None if given.device_type == "cpu" else "it reads the lengths on the host"


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


def _apex_problem(given: Input) -> str | None:
    if given.device_type != "cuda":
        return f"it needs a CUDA device, not {given.device_type}"
    return apex_problem()


def _onednn_problem(given: Input) -> str | None:
    if given.device_type != "cpu" or given.dtype != torch.float32:
        return f"it is for float32 on a CPU, not {given.dtype} on {given.device_type}"
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return "this PyTorch has no oneDNN"
    capability = torch.backends.cpu.get_cpu_capability()
    return None if capability == "AVX512" else f"it is faster than MKL with AVX-512 only; this CPU has {capability}"


def _always(given: Input) -> None:
    return None


# In order of preference. Triton stands first: the fallbacks are PyTorch's own and those of packages a user may have.
_IMPLEMENTATIONS: dict[str, dict[str, Callable[[Input], str | None]]] = {
    "masked_gather": {"triton": _triton_float_problem, "torch": _always},
    "block_attention": {
        "triton": _triton_attention_problem,
        "varlen": _flash_problem,
        "buckets": _host_lengths_problem,
        "padded": _always,
        "xformers": _xformers_problem,
    },
    "adamw_ema": {"triton": _triton_float_problem, "torch": _always, "apex": _apex_problem},
    "mask_sampling": {"triton": _triton_problem, "torch": _always},
    "target_loss": {"triton": _triton_float_problem, "torch": _always},
    "linear": {"onednn": _onednn_problem, "torch": _always},
}

OPERATIONS = tuple(_IMPLEMENTATIONS)
TRITON_OPERATIONS = tuple(op for op, choices in _IMPLEMENTATIONS.items() if "triton" in choices)


def request(wishes: Mapping[str, str]) -> None:
    """Ask for implementations by operation; "auto" (or an operation left out) is the first that can run.

    Raises:
        ValueError: an unknown operation or implementation. Whether it can run is seen at the first call.
    """
    _check("kernels", wishes)
    _requested.clear()
    _requested.update(wishes)
    _choose.cache_clear()


def _check(where: str, wishes: Mapping[str, str]) -> None:
    for op, name in wishes.items():
        if op not in _IMPLEMENTATIONS:
            raise ValueError(f"{where}: unknown operation {op!r}, expected one of {', '.join(_IMPLEMENTATIONS)}")
        if name != "auto" and name not in _IMPLEMENTATIONS[op]:
            raise ValueError(f"{where}: {op} = {name!r}, expected auto or one of {', '.join(_IMPLEMENTATIONS[op])}")


def _wish(op: str) -> tuple[str, str]:
    """The implementation asked for, or "auto", and who asked."""
    if not _wishes_count:
        return "auto", ""
    text = os.environ.get(ENVIRONMENT_VARIABLE, "")
    entries = [entry.strip() for entry in text.split(",") if entry.strip()]
    if any(entry.count("=") != 1 for entry in entries):
        raise ValueError(f"{ENVIRONMENT_VARIABLE}={text}: expected operation=implementation[,...]")
    wishes = dict(entry.split("=") for entry in entries)
    _check(f"{ENVIRONMENT_VARIABLE}={text}", wishes)
    if op in wishes:
        return wishes[op], ENVIRONMENT_VARIABLE
    return _requested.get(op, "auto"), f"kernels.{op}"


def implementations(op: str, device_type: str, dtype: torch.dtype, head_dim: int = 0) -> dict[str, str | None]:
    """The implementations of `op` in order of preference, each with the reason why it cannot take such inputs, or None."""
    given = Input(device_type, dtype, head_dim)
    return {name: problem(given) for name, problem in _IMPLEMENTATIONS[op].items()}


def choose(op: str, device_type: str, dtype: torch.dtype, head_dim: int = 0) -> str:
    """The name of the implementation of `op` that runs for such inputs.

    Raises:
        ValueError: the one that was asked for cannot take them; the message lists those that can.
    """
    return _choose(op, device_type, dtype, head_dim)


# As torch.compiler.assume_constant_result does, without its import of the compiler, a second of every start: else logging
# would break the graph.
choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _choose(op: str, device_type: str, dtype: torch.dtype, head_dim: int) -> str:
    problems = implementations(op, device_type, dtype, head_dim)
    wish, asker = _wish(op)
    kind = f"{dtype} on {device_type}" + (f", head dim {head_dim}" if head_dim else "")
    if wish != "auto" and problems[wish]:
        available = ", ".join(name for name, problem in problems.items() if not problem)
        raise ValueError(f"{asker}: {op} = {wish} cannot run for {kind}: {problems[wish]}; available: {available}")
    name = next(name for name, problem in problems.items() if not problem) if wish == "auto" else wish
    passed_over = [f"{n}: {p}" for n, p in list(problems.items())[: list(problems).index(name)] if p]
    reason = f"{asker}" if wish != "auto" else "; ".join(passed_over) or "the first choice"
    logger.info("%s for %s: %s (%s)", op, kind, name, reason)
    return name
