"""What this process may use of its machine: memory and cores, within the limits of its control groups; and which it is."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path

GIB = 2**30

# Of both versions of control groups: the controller's name, where it is mounted, and its files of the limit and of what is
# used, of which the pages in memory.stat that are cached files make room.
_MEMORY_GROUPS = (
    ("", "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    ("memory", "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
# The files of the time on all cores together and of the period that it may be used in.
_CPU_GROUPS = (
    ("", "sys/fs/cgroup", "cpu.max"),
    ("cpu", "sys/fs/cgroup/cpu", "cpu.cfs_quota_us", "cpu.cfs_period_us"),
)


def free_memory(root: Path = Path("/")) -> int:
    """Bytes of host memory that can still be had: what the machine has, or the limits of its control groups leave."""
    try:
        lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    left = [_left(group, *files) for controller in _MEMORY_GROUPS for group, files in _groups(root, *controller)]
    return min([free, *left])


def usable_cores(root: Path = Path("/")) -> float:
    """CPU cores that this process may keep busy: those that it may run on, or the share of time of its control groups."""
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [_quota(group, *files) for controller in _CPU_GROUPS for group, files in _groups(root, *controller)]
    return min([float(here), *quotas])


def busy_cores(seconds: float = 0.3, root: Path = Path("/")) -> float | None:
    """Cores of the machine that are at work for this long, whoever uses them; None: not known (not Linux)."""

    def ticks() -> tuple[int, int]:
        """Of all cores together since the start: all, and those spent idle or waiting for a disk."""
        of_all = (root / "proc/stat").read_text(encoding="ascii").partition("\n")[0].split()[1:9]
        return sum(map(int, of_all)), int(of_all[3]) + int(of_all[4])

    try:
        before = ticks()
        time.sleep(seconds)
        after = ticks()
    except OSError:
        return None
    every, idle = (new - old for new, old in zip(after, before, strict=True))
    return (os.cpu_count() or 1) * (1 - idle / every) if every else None


def _groups(root: Path, controller: str, mount: str, *files: str) -> Iterator[tuple[Path, tuple[str, ...]]]:
    """The groups of the process for a controller, from the topmost down."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            # A scheduler limits the group of a job, above that of the process. In a container the names may be those
            # outside, and lead nowhere, while the container's own limit is where its groups are mounted.
            names = path.strip("/").split("/")
            yield from ((root.joinpath(mount, *names[:depth]), files) for depth in range(len(names) + 1))


def _left(group: Path, limit: str, used: str, cached: str) -> int:
    """What the limit of one group leaves; without a limit, more than there is."""
    try:
        most, now = ((group / name).read_text(encoding="ascii").strip() for name in (limit, used))
        stat = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
    except OSError:  # no such group, or the topmost, which has none
        return 2**63
    return 2**63 if most == "max" else int(most) - int(now) + int(stat.get(cached, "0"))


def _quota(group: Path, *files: str) -> float:
    """Cores whose time one group may use; without a limit, more than there are."""
    try:
        words = " ".join((group / name).read_text(encoding="ascii") for name in files).split()
    except OSError:
        return float("inf")
    quota, period = words
    return float("inf") if quota in ("max", "-1") else int(quota) / int(period)


def cpu_name(root: Path = Path("/")) -> str:
    """The processor's model, as Linux knows it; else its architecture."""
    try:
        lines = (root / "proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):  # not Linux, or on ARM
        return platform.machine()
