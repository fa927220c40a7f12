"""Requests to stop: signals in and outside of training, and the step on which all ranks agree."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from fastjepa import distributed
from fastjepa.errors import Preempted
from fastjepa.run.stop_request import SIGNALS, StopRequest


def test_a_second_signal_does_no_harm() -> None:
    before = signal.getsignal(signal.SIGTERM)

    def train(request: StopRequest) -> None:
        with request.during_training():
            assert request.agreed() is None
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            assert request.agreed() == "SIGTERM"

    with StopRequest() as request, pytest.raises(Preempted, match="SIGTERM"):
        train(request)
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_outside_of_training_stops_at_once(number: signal.Signals) -> None:
    with StopRequest() as request:
        with request.during_training():
            pass
        with pytest.raises(Preempted, match=f"^{number.name}: stopped outside of training"):
            signal.raise_signal(number)


def test_a_thread_that_is_not_the_main_one_leaves_the_handlers_alone() -> None:
    """Python lets only the main thread set handlers; a run that is started in another thread must work all the same."""
    before, seen = [signal.getsignal(each) for each in SIGNALS], []

    def run() -> None:
        with StopRequest() as request, request.during_training():
            seen.append(request.agreed())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [None]
    assert [signal.getsignal(each) for each in SIGNALS] == before


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The control groups are real gloo groups, of this process alone."""
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    control = dist.new_group(backend="gloo")
    monkeypatch.setattr(distributed, "control_group", lambda name: control)
    yield
    distributed.finish()


@pytest.mark.usefixtures("group")
def test_with_several_ranks_a_signal_is_reported_one_step_later() -> None:
    """The exchange of a step is read in the next one, so that no rank waits for it."""
    agreed = []

    def train(request: StopRequest) -> None:
        with request.during_training():
            agreed.append(request.agreed())
            signal.raise_signal(signal.SIGUSR1)
            agreed.extend([request.agreed(), request.agreed()])

    with StopRequest() as request, pytest.raises(Preempted):
        train(request)
    assert agreed == [None, None, "SIGUSR1"]


@pytest.mark.usefixtures("group")
def test_a_signal_after_the_last_exchange_stops_the_run_after_training() -> None:
    agreed = []

    def train(request: StopRequest) -> None:
        with request.during_training():
            agreed.append(request.agreed())
            signal.raise_signal(signal.SIGTERM)
            agreed.append("the end of training")

    with StopRequest() as request, pytest.raises(Preempted, match="SIGTERM"):
        train(request)
    assert agreed == [None, "the end of training"]
