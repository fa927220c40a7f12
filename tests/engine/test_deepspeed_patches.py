"""Each patch of DeepSpeed does what it says, and the installed version of DeepSpeed still needs it.

A test named `..._still_...` fails when a new version of DeepSpeed no longer needs a patch: remove the patch then.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import os
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from fastjepa import distributed
from fastjepa.engine import deepspeed_patches
from fastjepa.engine.deepspeed_patches import GATHER, OFFLOAD, SHM_COMM

pytest.importorskip("deepspeed")
STAGE_1_AND_2 = "deepspeed.runtime.zero.stage_1_and_2"


@pytest.fixture(autouse=True)
def deepspeed_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """DeepSpeed is imported for the CPU, and missing functions are logged anew in each test."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    deepspeed_patches._no_longer_there.cache_clear()
    yield
    deepspeed_patches._no_longer_there.cache_clear()


def source_of(module: str, name: str = "") -> str:
    """The source of a module of the installed DeepSpeed, or of a function or class within it."""
    found: Any = importlib.import_module(module)
    for part in name.split(".") if name else ():
        found = getattr(found, part)
    return inspect.getsource(found)


def unneeded(patch: str, why: str) -> str:
    """The message of a test that fails because DeepSpeed does not need a patch any more."""
    deepspeed: Any = importlib.import_module("deepspeed")
    return f"DeepSpeed {deepspeed.__version__} {why}: remove {patch} from fastjepa/engine/deepspeed_patches.py"


def test_deepspeed_still_compiles_an_extension_for_cpus() -> None:
    ops: Any = importlib.import_module("deepspeed.ops")
    builder = source_of("deepspeed.comm.torch", "build_shm_op")
    assert SHM_COMM in ops.__compatible_ops__, unneeded("_without_shm_comm", f"has no {SHM_COMM}")
    assert "__compatible_ops__" in builder, unneeded("_without_shm_comm", "does not ask __compatible_ops__")
    assert "builder.load()" in builder, unneeded("_without_shm_comm", "does not compile the extension")


def test_deepspeed_still_warns_of_an_untested_optimizer() -> None:
    source = source_of("deepspeed.runtime.engine")
    assert "untested optimizer" in source, unneeded("the filter of the logger in _quieten", "warns of no optimizer")


def test_deepspeed_still_calls_collectives_that_pytorch_has_deprecated() -> None:
    why = "calls no collective that is deprecated"
    source = source_of("deepspeed.comm.torch", "TorchBackend")
    used = [name for name in ("all_gather_into_tensor", "reduce_scatter_tensor") if f"distributed.{name}" in source]
    deprecated = [name for name in used if hasattr(getattr(torch.distributed, name), "__deprecated__")]
    assert deprecated, unneeded("the filter of warnings in _quieten", why)


def test_zero_3_still_takes_local_rank_for_the_number_of_the_gpu() -> None:
    source = source_of("deepspeed.runtime.zero.partition_parameters")
    why = "does not take LOCAL_RANK for the GPU's number"
    assert 'device_name(os.environ["LOCAL_RANK"])' in source, unneeded("_local_rank", why)


def test_the_end_of_a_backward_pass_of_zero_1_and_2_still_waits_for_the_whole_gpu() -> None:
    source = source_of(STAGE_1_AND_2, "DeepSpeedZeroOptimizer.independent_gradient_partition_epilogue")
    why = "does not synchronise at the end of a backward pass"
    assert "get_accelerator().synchronize()" in source, unneeded("wait_on_the_device", why)
    assert "self.reduction_stream" in source_of(STAGE_1_AND_2), unneeded(
        "wait_on_the_device", "has no reduction_stream"
    )


@pytest.mark.parametrize("method", ["step", "update_lp_params"])
def test_zero_1_and_2_still_gather_all_weights_by_one_function(method: str) -> None:
    source = source_of(STAGE_1_AND_2, f"DeepSpeedZeroOptimizer.{method}")
    assert f"{GATHER}(" in source, unneeded("gather_replaced_by", f"calls no {GATHER} in {method}")
    module = importlib.import_module(STAGE_1_AND_2)
    assert callable(getattr(module, GATHER)), unneeded("gather_replaced_by", f"has no {GATHER}")


def test_zero_3_still_leaves_the_model_on_a_list_of_modules() -> None:
    module = importlib.import_module(OFFLOAD)
    assert isinstance(getattr(module, "FWD_MODULE_STACK", None), list), unneeded(
        "the list in forget", "has no FWD_MODULE_STACK"
    )
    assert "FWD_MODULE_STACK.append(self.module)" in inspect.getsource(module), unneeded(
        "the list in forget", "does not put the model on FWD_MODULE_STACK"
    )


def test_zero_3_still_has_methods_that_cache_their_results() -> None:
    source = source_of("deepspeed.runtime.zero.partitioned_param_coordinator", "PartitionedParameterCoordinator")
    assert "@functools.lru_cache" in source, unneeded("the caches in forget", "caches no results of ZeRO 3's methods")


def test_the_extension_for_cpus_is_turned_off(caplog: pytest.LogCaptureFixture) -> None:
    ops = ModuleType("ops")
    ops.__compatible_ops__ = {SHM_COMM: True, "another": True}  # type: ignore[attr-defined]
    deepspeed_patches._without_shm_comm(ops)
    assert ops.__compatible_ops__ == {SHM_COMM: False, "another": True}
    assert not caplog.records
    for _ in range(2):
        deepspeed_patches._without_shm_comm(ModuleType("ops without that list"))
    (message,) = caplog.messages
    assert message.startswith(f"this version of DeepSpeed has no {SHM_COMM}")


def test_only_messages_that_are_not_for_the_user_are_dropped() -> None:
    class DeepSpeed:
        class utils:
            logger = logging.Logger("stub of DeepSpeed's")

    deepspeed_patches._quieten(DeepSpeed)
    logger, shown = DeepSpeed.utils.logger, list[str]()

    class Shown(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            shown.append(record.getMessage())

    logger.addHandler(Shown())
    logger.info("of DeepSpeed's progress")
    logger.warning("You are using ZeRO with an untested optimizer")
    logger.warning("something else")
    assert shown == ["something else"]


def test_zero_3_takes_the_only_gpu_that_slurm_shows_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    deepspeed: Any = importlib.import_module("deepspeed")
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(distributed, "init_single_process_group", lambda: None)
    monkeypatch.setattr(deepspeed, "initialize", lambda *_, **__: [os.environ["LOCAL_RANK"]])
    assert deepspeed_patches.initialize(None, None, {}, "zero3.json") == "0"  # type: ignore[arg-type]
    assert os.environ["LOCAL_RANK"] == "3"


class Zero:
    """Stands in for DeepSpeed's optimizer of stage 1 or 2."""


@pytest.fixture
def module_of_zero(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module in which `Zero` seems to be defined."""
    module = ModuleType("stub_of_deepspeed")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(Zero, "__module__", module.__name__)
    return module


def test_the_function_that_gathers_is_put_back_after_a_step_that_fails(module_of_zero: Any) -> None:
    module_of_zero.all_gather_dp_groups = "DeepSpeed's own"

    def fail() -> None:
        with deepspeed_patches.gather_replaced_by(lambda: None, Zero()):
            assert callable(module_of_zero.all_gather_dp_groups)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert module_of_zero.all_gather_dp_groups == "DeepSpeed's own"


def test_nothing_is_left_behind_in_a_deepspeed_that_gathers_in_another_way(module_of_zero: Any) -> None:
    with deepspeed_patches.gather_replaced_by(lambda: None, Zero()):
        pass
    assert not hasattr(module_of_zero, GATHER)


def test_a_deepspeed_without_that_end_of_a_backward_pass_is_left_as_it_is(
    module_of_zero: Any, caplog: pytest.LogCaptureFixture
) -> None:
    zero = Zero()
    for _ in range(2):
        deepspeed_patches.wait_on_the_device(zero)
    assert vars(zero) == {}
    (message,) = caplog.messages
    assert message.startswith("this version of DeepSpeed has no independent_gradient_partition_epilogue")


def test_a_destroyed_engines_model_is_forgotten_and_others_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    mine, other = nn.Linear(1, 1), nn.Linear(1, 1)
    offload: Any = importlib.import_module(OFFLOAD)
    monkeypatch.setattr(offload, "FWD_MODULE_STACK", [other, mine])

    @functools.lru_cache(maxsize=None)  # noqa: UP033  # as DeepSpeed writes it
    def of_deepspeed(module: nn.Module) -> None:
        """Holds the modules that it was called with."""

    of_deepspeed.__module__ = "deepspeed.somewhere"
    of_deepspeed(mine)
    deepspeed_patches.forget(mine)  # type: ignore[arg-type]
    (left,) = offload.FWD_MODULE_STACK
    assert left is other
    assert of_deepspeed.cache_info().currsize == 0
