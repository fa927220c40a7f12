"""Free memory and usable cores, within the limits of control groups of both versions; the processor's name."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest

from fastjepa import host


def test_free_memory_is_known_here() -> None:
    assert 2**20 < host.free_memory() < 2**50


def machine(root: Path, groups: str, files: dict[str, str]) -> Path:
    """Make the root folder of a machine with 64 GiB free, the process's groups, and `files` below /sys/fs/cgroup."""
    files = {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    for name, text in {
        "proc/meminfo": f"MemAvailable: {64 * host.GIB // 1024} kB\n",
        "proc/self/cgroup": groups,
        **files,
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def group_v2(path: str, limit: object) -> dict[str, str]:
    return {
        f"{path}memory.max": f"{limit}\n",
        f"{path}memory.current": "3000\n",
        f"{path}memory.stat": "inactive_file 1000\n",
    }


def group_v1(path: str, limit: int) -> dict[str, str]:
    at = f"memory/{path}memory."
    return {
        f"{at}limit_in_bytes": f"{limit}\n",
        f"{at}usage_in_bytes": "3000\n",
        f"{at}stat": "total_inactive_file 1000\n",
    }


NO_LIMIT_V1 = 9223372036854771712


@pytest.mark.parametrize(
    ("groups", "files", "free"),
    [
        pytest.param("0::/\n", {}, 64 * host.GIB, id="no limit"),
        pytest.param("0::/\n", group_v2("", 10_000), 8_000, id="a container's own groups"),
        pytest.param(
            "0::/slurm/job_7/step_0/task_0\n",
            group_v2("slurm/job_7/step_0/task_0/", "max")
            | group_v2("slurm/job_7/step_0/", 20_000)
            | group_v2("slurm/job_7/", 10_000)
            | group_v2("slurm/", "max"),
            8_000,
            id="a job of SLURM",
        ),
        pytest.param(
            "0::/\n5:cpuset:/job_7\n4:cpu,memory:/job_7/step_0\n",
            group_v1("job_7/step_0/", NO_LIMIT_V1) | group_v1("job_7/", 10_000) | group_v1("", NO_LIMIT_V1),
            8_000,
            id="version 1",
        ),
        pytest.param("4:memory:/docker/1f00\n", group_v1("", 10_000), 8_000, id="version 1, in a container"),
    ],
)
def test_free_memory_is_what_the_tightest_control_group_above_the_process_leaves(
    tmp_path: Path, groups: str, files: dict[str, str], free: int
) -> None:
    assert host.free_memory(machine(tmp_path, groups, files)) == free


@pytest.mark.parametrize(
    ("groups", "files", "cores"),
    [
        pytest.param(
            "0::/job/step\n", {"job/cpu.max": "50000 100000\n", "job/step/cpu.max": "max 100000\n"}, 0.5, id="v2"
        ),
        pytest.param("0::/elsewhere\n", {"cpu.max": "25000 100000\n"}, 0.25, id="version 2, in a container"),
        pytest.param(
            "3:cpu,cpuacct:/job\n",
            {"cpu/job/cpu.cfs_quota_us": "30000\n", "cpu/job/cpu.cfs_period_us": "100000\n"},
            0.3,
            id="version 1",
        ),
    ],
)
def test_usable_cores_are_what_the_tightest_control_group_grants(
    tmp_path: Path, groups: str, files: dict[str, str], cores: float
) -> None:
    assert host.usable_cores(machine(tmp_path, groups, files)) == cores


def test_busy_cores_are_those_of_all_processes(tmp_path: Path) -> None:
    busy = host.busy_cores(0.1)
    assert busy is not None
    assert 0 <= busy <= (os.cpu_count() or 1)
    assert host.busy_cores(0.0, tmp_path) is None  # not Linux


def test_without_a_limit_all_cores_of_the_process_are_usable(tmp_path: Path) -> None:
    files = {"job/cpu.max": "max 100000\n"}
    assert host.usable_cores(machine(tmp_path, "0::/job\n", files)) == len(os.sched_getaffinity(0))


def test_the_processor_is_named_as_linux_does_or_by_its_architecture(tmp_path: Path) -> None:
    assert host.cpu_name(tmp_path) == platform.machine()
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "cpuinfo").write_text(
        "processor\t: 0\nmodel name\t: A CPU (R) @ 2 GHz\n\nmodel name\t: B\n", encoding="utf-8"
    )
    assert host.cpu_name(tmp_path) == "A CPU (R) @ 2 GHz"
