"""A training step has exactly the figures of benchmarks/results/counts.json, and every change of one is reported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.launch import launch
from benchmarks.proofs import counts
from benchmarks.proofs.counts import ACCEPT, RESULTS, Case, Counts, cases, changes, count, main, masks_of, problem_with
from fastjepa.models.layers import Mlp
from fastjepa.objectives.ijepa.costs import MaskLengths, forward_flops

RECORDED = json.loads(RESULTS.read_text(encoding="utf-8"))
CASE = Case("budget", "fp32")


@pytest.fixture(scope="module")
def counted_alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Counts]:
    """The figures of all cases, from a process of their own: ZeRO 3 replaces the linear layers of a process."""
    folder = tmp_path_factory.mktemp("counts")
    launch("benchmarks.proofs.counts", 1, "--output", str(folder))
    counts: dict[str, Counts] = json.loads((folder / RESULTS.name).read_text(encoding="utf-8"))["cases"]
    return counts


@pytest.mark.processes
@pytest.mark.skipif(problem_with(RECORDED) is not None, reason=str(problem_with(RECORDED)))
@pytest.mark.parametrize("case", list(cases()), ids=lambda case: case.name)
def test_a_step_has_the_recorded_figures(case: Case, counted_alone: dict[str, Counts]) -> None:
    reported = changes({case.name: RECORDED["cases"][case.name]}, {case.name: counted_alone[case.name]})
    assert not reported, "\n".join([*reported, f"If this is intended: {ACCEPT}"])


def test_every_case_is_recorded() -> None:
    assert list(RECORDED["cases"]) == [case.name for case in cases()]


@pytest.mark.parametrize(
    "case",
    [Case("ragged", "fp32"), Case("ragged", "bf16", checkpointing=True), Case("official", "bf16", engine="Triton")],
)
def test_two_runs_give_the_same_figures(case: Case) -> None:
    assert count(case) == count(case)


@pytest.mark.processes
@pytest.mark.parametrize("case", [case for case in cases() if not case.checkpointing], ids=lambda case: case.name)
def test_all_arithmetic_of_the_forward_pass_is_counted(case: Case, counted_alone: dict[str, Counts]) -> None:
    """The formulas of the model agree with the counted operators, so no operator lacks a formula."""
    images = case.config.global_batch_size
    formula = forward_flops(case.config, MaskLengths.of(masks_of(case, step=1)).tokens())
    parts = counted_alone[case.name]
    assert parts["target encoder"]["flops"] == pytest.approx(images * formula.target, rel=1e-12)
    rest = formula.context + formula.predictor + formula.ends + formula.embedding
    trained = parts["context encoder"]["flops"] + parts["predictor"]["flops"]
    assert trained == pytest.approx(images * rest, rel=1e-12)
    assert parts["backward"]["flops"] > 1.9 * trained


def test_a_new_copy_is_reported_with_its_place_and_size(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {CASE.name: count(CASE)}
    forward = Mlp.forward
    monkeypatch.setattr(Mlp, "forward", lambda self, x: forward(self, x.clone()))
    reported = changes(before, {CASE.name: count(CASE)})
    config, step = CASE.config, before[CASE.name]["context encoder"]
    tokens, layers = masks_of(CASE, step=1).context_lengths.total, config.model.size.depth
    copied = layers * tokens * config.model.size.embed_dim * 4
    for figure, more in (("operators", layers), ("allocations", layers), ("copied_bytes", copied)):
        a, b = step[figure], step[figure] + more
        assert f"{CASE.name}: context encoder: {figure} {a:,} -> {b:,} ({100 * more / a:+.1f} %)" in reported
    assert not [line for line in reported if "flops" in line or "optimizer" in line]


def test_memory_held_for_the_backward_pass_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[Tensor] = []
    before = {CASE.name: count(CASE)}
    norm = torch.nn.LayerNorm.forward

    def forward(self: torch.nn.LayerNorm, x: Tensor) -> Tensor:
        held.append(norm(self, x))
        return held[-1].clone()

    monkeypatch.setattr(torch.nn.LayerNorm, "forward", forward)
    reported = changes(before, {CASE.name: count(CASE)})
    assert [line for line in reported if line.startswith(f"{CASE.name}: target encoder: kept_bytes 0 -> ")]
    assert [line for line in reported if line.startswith(f"{CASE.name}: step: peak_bytes ")]


@pytest.fixture
def one_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that --check reads, with CASE as the only case."""
    monkeypatch.setattr(counts, "cases", lambda: iter([CASE]))
    monkeypatch.setattr(counts, "RESULTS", tmp_path / "counts.json")
    assert main(["--output", str(tmp_path)]) == 0
    return tmp_path / "counts.json"


def test_a_failed_check_names_the_change_and_how_to_accept_it(
    one_case: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--check"]) == 0
    assert "as recorded" in capsys.readouterr().out
    recorded = json.loads(one_case.read_text(encoding="utf-8"))
    operators = recorded["cases"][CASE.name]["backward"]["operators"]
    recorded["cases"][CASE.name]["backward"]["operators"] -= 1
    recorded["cases"]["another"] = {}
    one_case.write_text(json.dumps(recorded), encoding="utf-8")
    assert main(["--check"]) == 1
    printed = capsys.readouterr().out
    assert f"{CASE.name}: backward: operators {operators - 1:,} -> {operators:,} (+" in printed
    assert "another: gone" in printed
    assert f"2 figures changed. If this is intended: {ACCEPT}" in printed


def test_other_versions_are_not_compared(one_case: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorded = json.loads(one_case.read_text(encoding="utf-8"))
    recorded["versions"]["torch"] = "1.0.0"
    one_case.write_text(json.dumps(recorded | {"cases": {}}), encoding="utf-8")
    assert main(["--check"]) == 0
    here = torch.__version__.partition("+")[0]
    assert (
        f"not compared: counts.json was made with other versions; this installation has torch {here}, not 1.0.0"
        in capsys.readouterr().out
    )
