"""benchmarks.loader.listing opens data sets of the size that it says, once by listing and once from the cache."""

import logging
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.loader.listing import make_folder, make_list, measure


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("make", [make_folder, make_list])
def test_a_data_set_is_listed_once_and_then_opened_from_the_cache(
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
