"""benchmarks.kernels times only providers whose answer is right, and its table names the machine."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.kernel_cases import Work
from benchmarks.kernels.__main__ import main, measure
from benchmarks.kernels.contest import Contest, Providers
from fastjepa.profiling.timing import Ceilings, CeilingWork, Timed, Timing

CPU = torch.device("cpu")


CEILINGS = Ceilings(gigabytes_per_second=10.0, teraflops=0.1)


QUICK = ["--batch_size", "2", "--repeats", "2"]


class KnownCeilings(CeilingWork):
    """Ceilings that do not depend on this machine."""

    def ceilings(self, timings: Mapping[str, Timing]) -> Ceilings:
        assert "copy" in timings
        return CEILINGS


WORK = KnownCeilings({"copy": Timed(lambda: None)}, 1, 1)


@pytest.fixture(autouse=True)
def known_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CeilingWork, "on", lambda device, dtype: WORK)


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile(function: Callable[..., object], **options: object) -> Callable[..., object]:
        def refuse(*args: object) -> None:
            raise RuntimeError("there is no compiler\nat all")

        return refuse

    monkeypatch.setattr(torch, "compile", compile)


def test_only_providers_with_the_right_answer_are_timed() -> None:
    x = torch.arange(4.0)
    calls: list[str] = []

    def provider(name: str, answer: Callable[[], Tensor]) -> Callable[[], Callable[[], Tensor]]:
        def run() -> Tensor:
            calls.append(name)
            return answer()

        return lambda: run

    def fail() -> Tensor:
        raise RuntimeError("not today\nnor tomorrow")

    def cannot_be_built() -> Callable[[], Tensor]:
        raise RuntimeError("not today\nnor tomorrow")

    providers = Providers()
    for name, answer in {
        "right": lambda: x + 1,
        "nearly right": lambda: (x + 1) * (1 + 1e-4),
        "wrong": lambda: (x + 1) * 1.01,
        "not a number": lambda: x * torch.nan,
        "broadcast": lambda: (x + 1)[None],
        "fails": fail,
    }.items():
        providers.add(name, provider(name, answer))
    providers.add("cannot be built", cannot_be_built)
    providers.add("not here", provider("not here", lambda: x), "it needs another machine")
    contest = Contest("op", "part", "shape", torch.float32, Work(bytes=1000, flops=10), (x + 1,), providers)
    rows, missing = measure(contest, CPU, WORK, repeats=2)
    assert {row.provider for row in rows} == {"right", "nearly right"}
    assert missing == {
        "not here": "it needs another machine",
        "wrong": "output 0: relative error 1.0e-02 is above 1e-03",
        "not a number": "output 0: relative error nan is above 1e-03",
        "broadcast": "outputs of shapes [(1, 4)], expected [(4,)]",
        "fails": "RuntimeError: not today",
        "cannot be built": "RuntimeError: not today",
    }
    assert calls.count("right") > calls.count("wrong") == 1
    assert [row.timing.p50 for row in rows] == sorted(row.timing.p50 for row in rows)
    assert rows[0].share == max(rows[0].gigabytes_per_second / 10, rows[0].teraflops / 0.1)


@pytest.mark.usefixtures("no_compiler")
def test_the_table_names_the_machine_and_its_software(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--ops", "target_loss", "mask_sampling", *QUICK, "--output", str(tmp_path / "new folder")])
    with (tmp_path / "new folder" / "kernels.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {(row["op"], row["part"]) for row in rows} == {
        ("target_loss", "forward"),
        ("target_loss", "backward"),
        ("mask_sampling", "batch"),
    }
    for row in rows:
        assert 0 < float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"])
        assert (row["torch"], row["threads"], row["batch_size"]) == (torch.__version__, "1", "2")
        assert row["device"]
        assert {"driver", "triton", "xformers", "apex", "flash_attn"} < set(row)
        assert (float(row["copy_gb_per_s"]), float(row["matmul_tflop_per_s"])) == (10, 0.1)
        assert float(row["gb_per_s"]) == pytest.approx(int(row["bytes"]) / float(row["p50_ms"]) / 1e6, rel=1e-4)
    assert {row["provider"] for row in rows if row["op"] == "target_loss"} == {
        "fastjepa torch",
        "torch: layer_norm, index, smooth_l1",
    }
    for name in ("kernels.png", "kernels_roofline.png"):
        assert (tmp_path / "new folder" / name).stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "torch, compiled                              -    RuntimeError: there is no compiler\n" in printed
    assert "fastjepa triton                              -    it needs a CUDA device, not cpu" in printed


def test_too_few_rounds_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--repeats", "1"])
    assert "--repeats is 1, expected 2 or more" in capsys.readouterr().err
