"""Requests to stop: signals in and outside of training, and the step on which all ranks agree."""

from __future__ import annotations

import os
import signal

import pytest

from fastjepa.errors import Preempted
from fastjepa.run.stop_request import StopRequest


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
