"""benchmarks.launch reports ranks that fail or do not end."""

from __future__ import annotations

import pytest

from benchmarks.launch import launch

pytestmark = pytest.mark.processes


def test_the_error_has_the_output_of_failed_ranks() -> None:
    with pytest.raises(RuntimeError, match="a rank failed") as error:
        launch("json.tool", 2, "no such file")
    for rank in (0, 1):
        assert f"rank {rank} ended with" in str(error.value)
    assert str(error.value).count("No such file or directory") == 2


def test_a_rank_that_does_not_end_is_killed_and_named() -> None:
    with pytest.raises(RuntimeError, match=r"not done after 0.5 s\nrank 0 did not end"):
        launch("timeit", 1, "-n1", "-r1", "import time; time.sleep(100)", timeout=0.5)
