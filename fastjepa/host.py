"""Memory and cores that this process may use, within the limits of its control groups, and the processor's name."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path

GIB, MIB = 2**30, 2**20

# Both versions of control groups: name of the controller, mount point, files with the limit and the usage in bytes, and the
# key in memory.stat of the cached file pages, which count as used but are given up when memory runs short.
_MEMORY_GROUPS = (
    ("", "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    ("memory", "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
# Both versions: name of the controller, mount point, and the files with the CPU time, summed over all cores, that a group
# may use in each period, and with the length of the period.
_CPU_GROUPS = (
    ("", "sys/fs/cgroup", "cpu.max"),
    ("cpu", "sys/fs/cgroup/cpu", "cpu.cfs_quota_us", "cpu.cfs_period_us"),
)


def free_memory(root: Path = Path("/")) -> int:
    """Bytes of host memory that this process can still allocate: the least of the machine and its control groups."""
    try:
        lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    left = [_memory_left(group, *files) for controller in _MEMORY_GROUPS for group, files in _groups(root, *controller)]
    return min([free, *left])


def usable_cores(root: Path = Path("/")) -> float:
    """CPU cores that this process may keep busy: its CPU affinity or, if less, the time quota of its control groups."""
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [_core_quota(group, *files) for controller in _CPU_GROUPS for group, files in _groups(root, *controller)]
    return min([float(here), *quotas])


def busy_cores(seconds: float = 0.3, root: Path = Path("/")) -> float | None:
    """Mean number of the machine's cores that any process keeps busy during `seconds`; None where /proc/stat is missing."""

    def ticks() -> tuple[int, int]:
        """Clock ticks since the machine started, summed over all cores: total, and idle or waiting for a disk."""
        total = (root / "proc/stat").read_text(encoding="ascii").partition("\n")[0].split()[1:9]
        return sum(map(int, total)), int(total[3]) + int(total[4])

    try:
        before = ticks()
        time.sleep(seconds)
        after = ticks()
    except OSError:
        return None
    every, idle = (new - old for new, old in zip(after, before, strict=True))
    return (os.cpu_count() or 1) * (1 - idle / every) if every else None


def _groups(root: Path, controller: str, mount: str, *files: str) -> Iterator[tuple[Path, tuple[str, ...]]]:
    """Yield the folder of each control group that holds the process, from the topmost down, with `files`."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            # A scheduler sets the limit on the group of the job, an ancestor of the process's group: look at all ancestors.
            # In a container the path may be the one outside, which does not exist here; the container's own limit then
            # stands at the mount point, which is the topmost group.
            names = path.strip("/").split("/")
            yield from ((root.joinpath(mount, *names[:depth]), files) for depth in range(len(names) + 1))


def _memory_left(group: Path, limit: str, used: str, cached: str) -> int:
    """Bytes that the limit of one group leaves; 2**63 if the group has no limit."""
    try:
        most, now = ((group / name).read_text(encoding="ascii").strip() for name in (limit, used))
        stat = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
    except OSError:  # no such group, or the topmost, which has no limit
        return 2**63
    return 2**63 if most == "max" else int(most) - int(now) + int(stat.get(cached, "0"))


def _core_quota(group: Path, *files: str) -> float:
    """Cores whose time one group may use; infinity if the group has no limit."""
    try:
        words = " ".join((group / name).read_text(encoding="ascii") for name in files).split()
    except OSError:
        return float("inf")
    quota, period = words
    return float("inf") if quota in ("max", "-1") else int(quota) / int(period)


def cpu_name(root: Path = Path("/")) -> str:
    """Model name of the processor as Linux reports it; elsewhere, and on ARM, the architecture."""
    try:
        lines = (root / "proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()
