"""Facts of the host that are known without importing torch: versions, cores, memory, drivers."""

from __future__ import annotations

import os
import platform
import shutil
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path

from fastjepa.host import busy_cores, free_memory, usable_cores


@dataclass(frozen=True, kw_only=True)
class HostFacts:
    python: str
    system: str
    requirements: dict[str, tuple[str, str | None]] | None
    """Package -> the versions that fastjepa asks for, and the version installed, None if it is not. None as a whole:
    fastjepa itself is not installed."""
    has_apex: bool
    """A package named apex is installed, NVIDIA's or another."""
    nvidia_driver: str | None
    cores: float
    """CPU cores that this process may use."""
    cores_taken: float | None
    """Cores among them that other processes keep busy; None: unknown."""
    memory: int
    """Bytes of host memory that are free for this process."""
    omp_num_threads: str | None
    shm_free: int | None
    """Free bytes of /dev/shm; None: there is none."""


def gather_host_facts() -> HostFacts:
    shm = Path("/dev/shm")
    driver = Path("/proc/driver/nvidia/version")
    cores, busy = usable_cores(), busy_cores()
    return HostFacts(
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        requirements=_requirements(),
        has_apex=find_spec("apex") is not None,
        nvidia_driver=driver.read_text(encoding="utf-8").partition("\n")[0] if driver.is_file() else None,
        cores=cores,
        # Busy cores do not matter as long as they are those that this process may not use.
        cores_taken=None if busy is None else max(0.0, busy - ((os.cpu_count() or 1) - cores)),
        memory=free_memory(),
        omp_num_threads=os.environ.get("OMP_NUM_THREADS"),
        shm_free=shutil.disk_usage(shm).free if shm.is_dir() else None,
    )


def _requirements() -> dict[str, tuple[str, str | None]] | None:
    from packaging.requirements import Requirement

    try:
        wanted = [Requirement(line) for line in requires("fastjepa") or []]
    except PackageNotFoundError:
        return None
    here = [r for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})]
    return {r.name: (str(r.specifier), _version(r.name)) for r in here}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
