"""Weights gathered under the next step are equal to those of DeepSpeed's own gather, and every part waits for its own."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.launch import launch
from fastjepa.engine.zero_gather import WeightGather

two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@pytest.mark.processes
@pytest.mark.parametrize("cuda", [False, pytest.param(True, marks=[pytest.mark.gpu, two_gpus])])
def test_gathers_under_the_next_step_change_no_bit_however_late_they_end(tmp_path: Path, cuda: bool) -> None:
    """Two ranks train at stages 1 and 2, in fp32 and bf16, with accumulation and clipping."""
    launch("tests.workers.gather", 2, str(tmp_path), cuda=cuda)
    ranks = json.loads((tmp_path / "results.json").read_text())
    assert len(ranks) == 2
    for results in ranks:
        assert results.keys() == {"1 fp32", "1 bf16", "2 fp32", "2 bf16"}
        for case, same in results.items():
            expected = {"deepspeed": True, "overlapped": True, "late": True, "never waited for": False}
            assert same == expected, case


class Zero:
    """Stands in for DeepSpeed's optimizer: three groups of 4 elements on 2 ranks."""

    overflow = False

    def step(self) -> None:
        flat = [torch.zeros(4) for _ in range(3)]
        module: Any = sys.modules[type(self).__module__]
        module.all_gather_dp_groups(
            groups_flat=flat,
            partitioned_param_groups=[list(x.split(2)) for x in flat],
            dp_process_group=["group"] * 3,
            start_alignment_factor=1,
            allgather_bucket_size=1,
        )


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list to which launches and waits are added in their order, as "launch 0", "wait 0"."""
    events: list[str] = []

    class Work:
        def __init__(self) -> None:
            self.number = sum(event.startswith("launch") for event in events)
            events.append(f"launch {self.number}")

        def wait(self) -> None:
            events.append(f"wait {self.number}")

    def all_gather(output: Tensor, mine: Tensor, group: str, async_op: bool) -> Work:
        assert (output.numel(), mine.numel(), group, async_op) == (4, 2, "group", True)
        return Work()

    module: Any = ModuleType("stub_of_deepspeed")
    module.all_gather_dp_groups = lambda **_: events.append("DeepSpeed's own")
    monkeypatch.setitem(sys.modules, "stub_of_deepspeed", module)
    monkeypatch.setattr(Zero, "__module__", "stub_of_deepspeed")
    monkeypatch.setattr(dist, "all_gather_single", all_gather)
    monkeypatch.setattr(dist, "get_rank", lambda group: 1)
    return events


def test_each_part_waits_for_its_own_groups_before_it_computes(events: list[str]) -> None:
    context, target = nn.Sequential(nn.Linear(1, 1)), nn.Sequential(nn.Linear(1, 1))
    gather, zero = WeightGather(Zero(), [context, context, target]), Zero()
    with gather.launched_by_step():
        zero.step()
    assert events == ["launch 0", "launch 1", "launch 2"]
    context(torch.ones(1))
    assert events[3:] == ["wait 0", "wait 1"]
    target[0](torch.ones(1))  # a module within the part, called by itself
    assert events[5:] == ["wait 2"]
    context(torch.ones(1))
    gather.wait()
    assert len(events) == 6
    with gather.launched_by_step():
        zero.step()
    with gather.launched_by_step():  # it waits for gathers under way before it launches others
        assert sorted(events[9:]) == ["wait 3", "wait 4", "wait 5"]
    zero.step()
    assert events[12:] == ["DeepSpeed's own"]


def test_a_deepspeed_that_gathers_in_another_way_is_logged_once(
    events: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    zero = Zero()
    gather = WeightGather(zero, [nn.Linear(1, 1)])
    zero.overflow = True  # a skipped step gathers nothing
    with gather.launched_by_step():
        pass
    assert not caplog.records
    zero.overflow = False
    for _ in range(2):
        with gather.launched_by_step():
            pass
    assert [record.message.split(":")[0] for record in caplog.records] == [
        "DeepSpeed's step does not call all_gather_dp_groups"
    ]
