"""Threads of OpenMP that wait."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from benchmarks.launch import ROOT
from fastjepa.launch.openmp import set_wait_policy


def test_waiting_threads_sleep_unless_the_user_asked_for_something_else() -> None:
    environment = {"OMP_WAIT_POLICY": "ACTIVE"}
    set_wait_policy(environment)
    assert environment == {"OMP_WAIT_POLICY": "ACTIVE", "GOMP_SPINCOUNT": "10000"}


@pytest.mark.processes
def test_train_sets_the_policy_before_torch_is_imported() -> None:
    code = """
import os, sys
from fastjepa.launch import openmp
assert "torch" not in sys.modules
policy, openmp.set_wait_policy = openmp.set_wait_policy, lambda: (policy(), print("torch" in sys.modules))
import fastjepa.train
print(os.environ["OMP_WAIT_POLICY"], "torch" in sys.modules)
"""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    process = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert process.stdout.split() == ["False", "PASSIVE", "True"]
