"""benchmarks.loader --soak prints the memory ten times."""

from __future__ import annotations

import pytest

from benchmarks.loader.__main__ import main


def test_memory_is_printed_ten_times(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--soak", "20", "--batch_size", "2", "--threads", "1"])
    printed = capsys.readouterr().out
    assert "fastjepa turbo: 20 batches of 2 small images" in printed
    points = printed.split("100 %: ")[1].split(";")[0].split()
    assert len(points) == 10
    assert float(points[0]) > 10
