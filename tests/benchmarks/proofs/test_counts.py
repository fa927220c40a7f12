"""What one training step does is what benchmarks/results/counts.json says, to the last operator; and a change is told."""

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
from fastjepa.objectives.ijepa.costs import Lengths, forward_flops

RECORDED = json.loads(RESULTS.read_text(encoding="utf-8"))
CASE = Case("budget", "fp32")


@pytest.fixture(scope="module")
def counted_alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Counts]:
    """In a process of its own: once ZeRO 3 has run in one, its linear layers are DeepSpeed's."""
    folder = tmp_path_factory.mktemp("counts")
    launch("benchmarks.proofs.counts", 1, "--output", str(folder))
    counts: dict[str, Counts] = json.loads((folder / RESULTS.name).read_text(encoding="utf-8"))["cases"]
    return counts


@pytest.mark.parametrize("case", list(cases()), ids=lambda case: case.name)
def test_a_step_does_what_is_recorded(case: Case, counted_alone: dict[str, Counts]) -> None:
    if problem := problem_with(RECORDED):
        pytest.skip(problem)
    told = changes({case.name: RECORDED["cases"][case.name]}, {case.name: counted_alone[case.name]})
    assert not told, "\n".join([*told, f"If this is intended: {ACCEPT}"])


def test_every_case_is_recorded() -> None:
    assert list(RECORDED["cases"]) == [case.name for case in cases()]


@pytest.mark.parametrize(
    "case",
    [Case("ragged", "fp32"), Case("ragged", "bf16", checkpointing=True), Case("official", "bf16", engine="Triton")],
)
def test_two_runs_give_the_same_figures(case: Case) -> None:
    assert count(case) == count(case)


@pytest.mark.parametrize("case", [case for case in cases() if not case.checkpointing], ids=lambda case: case.name)
def test_all_arithmetic_of_the_forward_pass_is_counted(case: Case, counted_alone: dict[str, Counts]) -> None:
    """Whichever operators do it: one without a formula would be missing here."""
    images = case.config.global_batch_size
    formula = forward_flops(case.config, Lengths.of(masks_of(case, step=1)).tokens())
    parts = counted_alone[case.name]
    assert parts["target encoder"]["flops"] == pytest.approx(images * formula.target, rel=1e-12)
    rest = formula.context + formula.predictor + formula.ends + formula.embedding
    trained = parts["context encoder"]["flops"] + parts["predictor"]["flops"]
    assert trained == pytest.approx(images * rest, rel=1e-12)
    assert parts["backward"]["flops"] > 1.9 * trained


def test_a_copy_that_was_not_there_is_told_with_its_place_and_size(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {CASE.name: count(CASE)}
    forward = Mlp.forward
    monkeypatch.setattr(Mlp, "forward", lambda self, x: forward(self, x.clone()))
    told = changes(before, {CASE.name: count(CASE)})
    config, step = CASE.config, before[CASE.name]["context encoder"]
    tokens, layers = masks_of(CASE, step=1).context.total, config.model.size.depth
    copied = layers * tokens * config.model.size.embed_dim * 4
    for figure, more in (("operators", layers), ("allocations", layers), ("copied_bytes", copied)):
        a, b = step[figure], step[figure] + more
        assert f"{CASE.name}: context encoder: {figure} {a:,} -> {b:,} ({100 * more / a:+.1f} %)" in told
    assert not [line for line in told if "flops" in line or "optimizer" in line]


def test_memory_held_for_backward_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[Tensor] = []
    before = {CASE.name: count(CASE)}
    norm = torch.nn.LayerNorm.forward

    def forward(self: torch.nn.LayerNorm, x: Tensor) -> Tensor:
        held.append(norm(self, x))
        return held[-1].clone()

    monkeypatch.setattr(torch.nn.LayerNorm, "forward", forward)
    told = changes(before, {CASE.name: count(CASE)})
    assert [line for line in told if line.startswith(f"{CASE.name}: target encoder: kept_bytes 0 -> ")]
    assert [line for line in told if line.startswith(f"{CASE.name}: step: peak_bytes ")]


@pytest.fixture
def one_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that a check reads, when there is no other case than CASE."""
    monkeypatch.setattr(counts, "cases", lambda: iter([CASE]))
    monkeypatch.setattr(counts, "RESULTS", tmp_path / "counts.json")
    assert main(["--output", str(tmp_path)]) == 0
    return tmp_path / "counts.json"


def test_a_check_fails_with_the_change_and_how_to_accept_it(one_case: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
