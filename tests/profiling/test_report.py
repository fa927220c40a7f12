"""The files that a profile leaves behind, and the benchmark that writes them."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from benchmarks import throughput
from fastjepa.config import Config, ModelConfig
from fastjepa.errors import RunFolderError
from fastjepa.objectives.ijepa.settings import IJEPAConfig
from fastjepa.profiling import Ceilings, Memory, Operator, Part, StepProfile, TimeSplit, Timing
from fastjepa.profiling.output import write_report
from fastjepa.profiling.plots import nice_ticks
from fastjepa.profiling.report import Report, format_profile
from tests.support.small import small_config
from tests.support.tiny_run import write_recipe

HOSTILE = '<script>alert("x")</script>'
OPERATORS = (
    Operator("aten::mm", "matmul", 12.0, 60.0, 0.6),
    Operator(f"void kernel<float, {HOSTILE}>(int)", "other", 1.0, 20.0, 0.2),
)
PROFILE = StepProfile(
    device="NVIDIA H100 80GB HBM3", on_gpu=True, precision="bfloat16", threads=16, ranks=8, micro_batch_size=128,
    grad_accum_steps=2, step_ms=Timing(95.5, 101.25, 110.0), steps_ms=(95.5, 101.25, 110.0), images_per_second=20227.2,
    tokens_per_second=2345678.9, data_wait=0.031,
    tokens={"patches": 196, "context": 81.3, "context_squares": 6700.0, "target": 136.5, "predictor": 460.0},
    teraflop_per_step=31.7, teraflops=313.4, ceilings=Ceilings(2600.0, 700.5), mfu=0.4474,
    datasheet_teraflops=989.0, datasheet_mfu=0.3169,
    split=TimeSplit(
        104.0, (Part("backward", 80.0, 0.769), Part("idle", 24.0, 0.231)), (Part("loader", 52.0, 0.5),), 0.6, OPERATORS
    ),
    memory=Memory(400 << 20, 330 << 20, 400 << 20, 0, 800 << 20, 20 << 30, 1 << 30),
)  # fmt: skip


def at(micro: int, images_per_second: float) -> StepProfile:
    """A point of a sweep."""
    return dataclasses.replace(PROFILE, micro_batch_size=micro, images_per_second=images_per_second)


def full_report(output_dir: str = "runs/x") -> Report:
    synthetic = dataclasses.replace(PROFILE, images_per_second=21000.5)
    sweep = (at(1, 500.0), at(2, 960.0), at(4, 1810.0), at(8, 1850.0), at(16, 1830.0))
    config = Config(output_dir=output_dir, model=ModelConfig(name="vit_base"), objective=IJEPAConfig())
    return Report("python -m benchmarks.throughput", config, PROFILE, synthetic, sweep, "Up to 16.")


class Tags(HTMLParser):
    """Checks that every tag is closed in its order, and keeps tags and attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        self.attributes += attrs
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_holds_the_figures_and_loads_nothing(tmp_path: Path) -> None:
    write_report(full_report(HOSTILE), tmp_path)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    for figure in (
        "20,227",
        "2,345,679",
        "101 ms",
        "44.7%",
        "31.7%",
        "60%",
        "3.1%",
        "313 TFLOP/s",
        "989 TFLOP/s",
        "76.9%",
    ):
        assert figure in text, figure
    assert "the knee is at 4" in text
    tags = Tags()
    tags.feed(text)
    assert not tags.open
    assert not tags.seen & {"script", "link", "img", "iframe", "object", "image", "use"}
    assert not [name for name, _ in tags.attributes if name in ("src", "href", "srcset") or name.startswith("on")]
    assert not re.search(r"https?:|url\(|@import", text)
    assert HOSTILE in unescape(text)  # shown as text, never as markup
    assert HOSTILE not in text


def test_a_page_without_sweep_and_synthetic_images_does_not_mention_them(tmp_path: Path) -> None:
    """`--profile` writes one."""
    write_report(Report("fastjepa/train.py --profile", small_config(), PROFILE), tmp_path)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "196.0 patches, 81.3 context, 136.5 target, 460.0 predictor." in text  # squares are for formulas only
    assert "knee" not in text
    assert "synthetic" not in text


def test_json_and_csv_hold_every_measurement(tmp_path: Path) -> None:
    write_report(full_report(), tmp_path)
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["knee"] == 4
    assert content["torch"] == torch.__version__
    assert [m["of"] for m in content["measurements"]] == ["run", "synthetic", *["sweep"] * 5]
    assert content["measurements"][0]["split"]["operators"][0]["name"] == "aten::mm"
    with (tmp_path / "report.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["images_per_second"]) for row in rows] == [20227.2, 21000.5, 500, 960, 1810, 1850, 1830]
    assert float(rows[0]["datasheet_mfu"]) == 0.3169
    with (tmp_path / "operators.csv").open(encoding="utf-8", newline="") as file:
        assert [row["name"] for row in csv.DictReader(file)] == [row.name for row in OPERATORS]


def test_the_table_for_a_terminal_has_the_same_figures() -> None:
    text = format_profile(PROFILE)
    for figure in ("101.2 ms", "20,227.2 images/s", "44.7%", "31.7%", "backward", "loader", "aten::mm"):
        assert figure in text


def test_the_knee_is_the_smallest_micro_batch_within_5_percent_of_the_best_speed() -> None:
    report = full_report()
    assert report.knee is not None
    assert report.knee.micro_batch_size == 4  # 1810 of 1850 images/s: 2 % are not worth twice the memory
    assert Report("", small_config(), PROFILE).knee is None


def test_a_report_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="cannot be written"):
        write_report(full_report(), tmp_path / "missing")


@pytest.mark.parametrize(
    ("largest", "ticks"), [(1.0, [0, 0.2, 0.4, 0.6, 0.8, 1.0]), (7.1, [0, 2, 4, 6, 8]), (0.0, [0, 1])]
)
def test_axes_have_round_ticks(largest: float, ticks: list[float]) -> None:
    assert nice_ticks(largest) == ticks


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_recipe(tmp_path_factory.mktemp("recipe"))


def test_the_benchmark_measures_real_and_synthetic_images_and_the_sweep(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(throughput, "LARGEST", 2)
    few = ["--warmup", "0", "--steps", "2", "--traced", "1"]
    mode = "objective.masks.mode=official"
    assert throughput.main(["--config", recipe, mode, "--output", str(tmp_path / "out"), *few]) == 0
    content = json.loads((tmp_path / "out" / "report.json").read_text())
    of = [(m["of"], m["micro_batch_size"]) for m in content["measurements"]]
    assert of == [("run", 8), ("synthetic", 8), ("sweep", 1), ("sweep", 2)]
    assert content["config"]["objective"]["masks"]["mode"] == "official"
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"report.html", "report.json", "report.csv", "operators.csv", "trace.json"}
    printed = capsys.readouterr().out
    assert "synthetic" in printed
    assert "the knee is at" in printed
    parts = {part["name"] for part in content["measurements"][0]["split"]["beside"]}
    assert parts == {"loader", "preparing"} or not parts  # all batches may have been ready before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model.nam=vit_huge"], "unknown key model.nam"),
        (["data.source=/missing"], "/missing"),
        (["global_batch_size=100"], "global_batch_size = 100: the data set has 70 images"),
        (["micro_batch_size=3"], "micro_batch_size = 3: expected a divisor of 8"),
        (["--output", "/dev/null/x"], "--output /dev/null/x: cannot be written"),
    ],
)
def test_mistakes_are_named(
    arguments: list[str], message: str, recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert throughput.main(["--config", recipe, "--output", str(tmp_path), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_too_few_steps_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        throughput.main(["--steps", "1"])
    assert "--steps 1: expected 2 or more" in capsys.readouterr().err
