"""Sets how long the threads of OpenMP, with which torch computes on a CPU, spin while they wait for work."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

# Without these, waiting threads spin for milliseconds. Where they share their cores with the threads that decode images, or
# with another job, a step then takes ten times as long. 10,000 spins of GNU's OpenMP last some ten microseconds, which
# bridges the gap between two operations.
_DEFAULTS = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "10000"}


def set_wait_policy(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let waiting threads sleep, unless the user asked for something else.

    Call it before torch is imported: OpenMP reads the environment when it is loaded.
    """
    for name, value in _DEFAULTS.items():
        environment.setdefault(name, value)
