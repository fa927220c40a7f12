"""The benchmark of opening data sets opens what it says it does."""

import logging
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.loader.listing import make_folder, make_list, measure


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("make", [make_folder, make_list])
def test_a_source_of_so_many_images_is_listed_once(
    tmp_path: Path,
    make: Callable[[Path, int], Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setenv("FASTJEPA_CACHE", str(tmp_path / "cache"))
    source = make(tmp_path / "source", 2500)
    assert [measure(str(source))["images"] for _ in range(2)] == [2500, 2500]
    assert sum("2500 images listed in" in message for message in caplog.messages) == 1
