"""The figures of benchmarks.long_run."""

from __future__ import annotations

from pathlib import Path

from benchmarks.long_run import disk, tenths


def test_tenths_show_a_leak_and_a_slowdown() -> None:
    lines = [{"memory_gib": 1 + i / 1024, "images_per_second": 8000 / (1 + i // 10)} for i in range(20)]
    figures = tenths(lines)
    assert figures["peak_memory_mib"] == [1024 + 2 * i + 1 for i in range(10)]
    assert figures["step_ms"] == [1.0] * 5 + [2.0] * 5


def test_disk_counts_checkpoints_files_and_bytes(tmp_path: Path) -> None:
    for name in ("step_1", "step_2"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "shard").write_bytes(bytes(100))
    (tmp_path / "checkpoints" / "latest").write_text("step_2")
    (tmp_path / "metrics.jsonl").write_bytes(bytes(10))
    assert disk(tmp_path) == {"metrics_bytes": 10, "checkpoints": 2, "checkpoint_bytes": 200, "files": 4}
