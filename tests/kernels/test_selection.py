"""The choice of an implementation by device, dtype, head dim and request, and the error for a request that cannot run."""

import logging
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch

from fastjepa.config import KernelsConfig
from fastjepa.engine.build import operations_of
from fastjepa.objectives.registry import method_of
from fastjepa_kernels import (
    OPERATIONS,
    Operation,
    choose,
    gather_add,
    implementations,
    request,
    selection,
    without_requests,
)
from tests.support.small import small_config


@pytest.fixture(autouse=True)
def no_requests(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(selection.ENVIRONMENT_VARIABLE, raising=False)
    request({})
    yield
    request({})


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(selection, "triton_problem", lambda: None)


def test_a_cpu_runs_pytorch() -> None:
    chosen = {op: choose(op, "cpu", torch.float32, 64 if op == "block_attention" else 0) for op in OPERATIONS}
    assert chosen.pop("block_attention") == "buckets"
    assert chosen.pop("linear") in ("onednn", "torch")  # the former on CPUs with AVX-512
    assert set(chosen.values()) == {"torch"}


@pytest.mark.usefixtures("a_gpu")
def test_a_gpu_runs_triton() -> None:
    chosen = {op: choose(op, "cuda", torch.bfloat16, 64) for op in OPERATIONS}
    assert chosen.pop("linear") == "torch"
    assert set(chosen.values()) == {"triton"}


@pytest.mark.parametrize(("capability", "expected"), [("AVX512", "onednn"), ("AVX2", "torch")])
def test_onednn_multiplies_in_fp32_where_there_is_avx512(
    capability: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    request({})
    assert choose("linear", "cpu", torch.float32) == expected
    assert choose("linear", "cpu", torch.bfloat16) == "torch"


@pytest.mark.usefixtures("a_gpu")
@pytest.mark.parametrize(
    ("dtype", "head_dim", "expected"), [(torch.bfloat16, 160, "varlen"), (torch.float32, 20, "padded")]
)
def test_attention_falls_back_where_triton_takes_no_such_head_dim(
    dtype: torch.dtype, head_dim: int, expected: str
) -> None:
    assert choose("block_attention", "cuda", dtype, head_dim) == expected


@pytest.mark.usefixtures("a_gpu")
@pytest.mark.parametrize("op", ["masked_gather", "adamw_ema", "target_loss"])
def test_fp64_runs_on_pytorch(op: str) -> None:
    assert choose(op, "cuda", torch.float64) == "torch"


@pytest.mark.usefixtures("a_gpu")
def test_an_operation_chooses_by_its_fields() -> None:
    attention = Operation("block_attention", torch.float32, 160)
    assert attention.choose("cuda") == choose("block_attention", "cuda", torch.float32, 160) == "padded"
    assert attention.implementations("cuda") == implementations("block_attention", "cuda", torch.float32, 160)
    assert tuple(attention.implementations("cuda")) == OPERATIONS["block_attention"]
    assert Operation("mask_sampling", torch.int64).choose("cuda") == "triton"


@pytest.mark.usefixtures("a_gpu")
def test_requests_do_not_reach_work_beside_a_run() -> None:
    request({"block_attention": "varlen"})
    with pytest.raises(ValueError, match="varlen cannot run"):
        choose("block_attention", "cuda", torch.float32, 64)
    with without_requests():
        assert choose("block_attention", "cuda", torch.float32, 64) == "triton"
    assert choose("block_attention", "cuda", torch.bfloat16, 64) == "varlen"


def test_a_choice_does_not_break_a_compiled_graph() -> None:
    table, positions = torch.randn(4, 8), torch.tensor([1, 3])
    compiled = torch.compile(lambda x: gather_add(x, table, positions), fullgraph=True, backend="eager")
    tokens = torch.randn(2, 8)
    assert torch.equal(compiled(tokens), gather_add(tokens, table, positions))


def test_a_gpu_older_than_ampere_does_not_run_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert choose("target_loss", "cuda", torch.float16) == "torch"
    assert choose("block_attention", "cuda", torch.float16, 64) == "padded"


def test_a_gpu_on_which_triton_cannot_start_runs_pytorch_and_the_reason_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """This machine has no GPU at all, which gives the error that a missing C compiler gives."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    with caplog.at_level(logging.INFO):
        assert choose("target_loss", "cuda", torch.float16) == "torch"
    assert "(triton: triton needs a C compiler (gcc, clang or $CC), Python's headers and libcuda: " in caplog.text


def test_a_choice_is_logged_once_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        choose("target_loss", "cpu", torch.float32)
        choose("target_loss", "cpu", torch.float32)
    assert [record.getMessage() for record in caplog.records] == [
        "target_loss for torch.float32 on cpu: torch (triton: it needs a CUDA device, not cpu)"
    ]


@pytest.mark.usefixtures("a_gpu")
def test_a_request_is_followed_and_the_environment_goes_before_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    request({"block_attention": "padded", "adamw_ema": "torch"})
    assert choose("block_attention", "cuda", torch.bfloat16, 64) == "padded"
    monkeypatch.setenv(selection.ENVIRONMENT_VARIABLE, "block_attention=varlen, target_loss=auto")
    request({"block_attention": "padded", "adamw_ema": "torch"})  # forgets the choices made so far
    assert choose("block_attention", "cuda", torch.bfloat16, 64) == "varlen"
    assert choose("adamw_ema", "cuda", torch.float32) == "torch"


def test_a_request_that_cannot_run_is_an_error_that_lists_what_can() -> None:
    request({"block_attention": "triton"})
    expected = (
        r"kernels.block_attention: block_attention = triton cannot run for torch.float32 on cpu, head dim 64: "
        r"it needs a CUDA device, not cpu; available: buckets, padded"
    )
    with pytest.raises(ValueError, match=expected):
        choose("block_attention", "cpu", torch.float32, 64)


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        ({"attention": "triton"}, "unknown operation 'attention', expected one of masked_gather, block_attention"),
        ({"adamw_ema": "cuda"}, "adamw_ema = 'cuda', expected auto or one of triton, torch, apex"),
    ],
)
def test_an_unknown_name_is_refused_with_the_known_ones(requests: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        request(requests)


def test_a_malformed_variable_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(selection.ENVIRONMENT_VARIABLE, "triton")
    with pytest.raises(ValueError, match="FASTJEPA_KERNELS=triton: expected operation=implementation"):
        choose("masked_gather", "cpu", torch.float32)


def _pretend_apex(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    for name in names:
        module = types.ModuleType(name)
        module.__spec__ = ModuleSpec(name, None, is_package=True)
        module.__path__ = []
        monkeypatch.setitem(sys.modules, name, module)
    selection.apex_problem.cache_clear()


@pytest.fixture
def forget_apex() -> Iterator[None]:
    yield
    selection.apex_problem.cache_clear()


@pytest.mark.usefixtures("a_gpu", "forget_apex")
@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ((), "NVIDIA apex is not installed"),
        (("apex",), "the installed apex is not NVIDIA's"),
        (("apex", "apex.optimizers"), "apex is installed without its CUDA extension"),
    ],
)
def test_an_apex_that_cannot_be_used_is_refused_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, modules: tuple[str, ...], message: str
) -> None:
    _pretend_apex(monkeypatch, *modules)
    request({"adamw_ema": "apex"})
    with pytest.raises(ValueError, match=message):
        choose("adamw_ema", "cuda", torch.float32)


@pytest.mark.usefixtures("a_gpu", "forget_apex")
def test_nvidia_apex_runs_only_when_it_is_requested(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend_apex(monkeypatch, "apex", "apex.optimizers", "amp_C")
    assert choose("adamw_ema", "cuda", torch.float32) == "triton"
    request({"adamw_ema": "apex"})
    assert choose("adamw_ema", "cuda", torch.float32) == "apex"


def test_the_settings_offer_exactly_the_implementations_that_exist() -> None:
    offered = {name: set(get_args(hint)) - {"auto"} for name, hint in get_type_hints(KernelsConfig).items()}
    assert offered == {op: set(names) for op, names in OPERATIONS.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_of_ijepa_names_every_operation_that_exists(dtype: torch.dtype) -> None:
    """So one list feeds the engine, the doctor, the settings and the benchmarks."""
    operations = operations_of(method_of(small_config()), dtype)
    assert {operation.name for operation in operations} == set(OPERATIONS)
    head_dims = {operation.head_dim for operation in operations if operation.name == "block_attention"}
    assert head_dims == {24 // 3, 12 // 3}  # of the encoders and of the predictor


@pytest.mark.processes
def test_importing_the_kernels_does_not_import_the_compiler() -> None:
    """The import of the compiler takes a second, and most processes compile nothing."""
    code = "import sys, fastjepa_kernels, fastjepa.objectives.ijepa.objective; sys.exit('torch._dynamo' in sys.modules)"
    path = os.pathsep.join(str(Path(selection.__file__).parents[up]) for up in (1, 2))
    assert (
        subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, check=False).returncode == 0
    )
