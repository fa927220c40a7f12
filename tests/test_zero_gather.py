"""Weights that travel under the next step are those that DeepSpeed's own gather brings."""

from __future__ import annotations

import json
from pathlib import Path

from tests.test_trajectory import launch


def test_gathers_under_the_next_step_change_no_bit_however_late_they_come(tmp_path: Path) -> None:
    """Stages 1 and 2, fp32 and bf16, with accumulation and clipping, on two ranks."""
    launch("worker_gather", 2, str(tmp_path))
    ranks = json.loads((tmp_path / "results.json").read_text())
    assert len(ranks) == 2
    for results in ranks:
        assert results.keys() == {"1 fp32", "1 bf16", "2 fp32", "2 bf16"}
        for case, same in results.items():
            expected = {"deepspeed": True, "overlapped": True, "late": True, "never waited for": False}
            assert same == expected, case
