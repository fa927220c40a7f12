"""benchmarks.scaling measures growth beside the formula's."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from benchmarks import scaling

SMALL = [
    "data.image_size=64", "model.patch_size=8", "model.embed_dim=48", "model.depth=3", "model.predictor_embed_dim=48",
    "model.predictor_depth=2", "global_batch_size=16",
]  # fmt: skip


def test_the_exponent_of_a_power_law_is_found() -> None:
    xs = [1.0, 2.0, 4.0, 8.0]
    assert scaling.exponent(xs, [3 * x**1.7 for x in xs]) == pytest.approx(1.7)


@pytest.mark.processes
def test_two_ranks_share_the_memory_of_a_step_and_formulas_agree_with_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scaling.main([*SMALL, "--axes", "ranks", "--steps", "2", "--output", str(tmp_path)])
    with (tmp_path / "scaling.csv").open(encoding="utf-8", newline="") as file:
        alone, together = csv.DictReader(file)
    assert (alone["value"], together["value"]) == ("1", "2")
    for row in (alone, together):
        assert float(row["step_ms_p20"]) <= float(row["step_ms"]) <= float(row["step_ms_p80"])
        assert 0.7 < float(row["memory"]) / float(row["formula_memory"]) < 1.5
    assert float(together["memory"]) < float(alone["memory"])  # half the images each
    assert (tmp_path / "scaling.png").stat().st_size > 0
    assert "ranks that share" in capsys.readouterr().out
