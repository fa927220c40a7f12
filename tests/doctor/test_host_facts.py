"""Facts of this machine."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version

import pytest

from fastjepa.doctor import host_facts
from fastjepa.doctor.host_facts import gather_host_facts


def test_the_facts_are_those_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    facts = gather_host_facts()
    assert facts.python == platform.python_version()
    assert facts.cores > 0
    assert facts.memory > 0
    assert facts.omp_num_threads == "3"


def test_only_cores_that_may_be_used_count_as_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine has 8 cores, of which this process may use 2."""
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(host_facts, "usable_cores", lambda: 2.0)
    for busy, taken in ((5.0, 0.0), (7.5, 1.5), (None, None)):
        monkeypatch.setattr(host_facts, "busy_cores", lambda busy=busy: busy)
        assert gather_host_facts().cores_taken == taken


def test_requirements_are_compared_with_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["pytest>=1", "no-such-package>=2", "pytest>=1; extra == 'dev'", "numpy>9; python_version < '3'"]
    monkeypatch.setattr(host_facts, "requires", lambda _: lines)
    assert gather_host_facts().requirements == {
        "pytest": (">=1", installed_version("pytest")),
        "no-such-package": (">=2", None),
    }


def test_a_package_that_runs_from_its_sources_has_no_requirements(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_installed(package: str) -> list[str]:
        raise PackageNotFoundError(package)

    monkeypatch.setattr(host_facts, "requires", not_installed)
    assert gather_host_facts().requirements is None
