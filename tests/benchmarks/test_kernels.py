"""The kernels' benchmark times nobody whose answer is wrong, says whose times these are, and compares revisions fairly."""

from __future__ import annotations

import csv
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.kernel_cases import Choice, Work
from benchmarks.kernels import compare
from benchmarks.kernels.__main__ import main, measure
from benchmarks.kernels.compare import compared, kernels_of
from benchmarks.kernels.contest import Contest, Providers
from benchmarks.kernels.contests import CONTESTS
from benchmarks.kernels.plot import plot_roofline, plot_times
from benchmarks.launch import ROOT
from fastjepa.errors import ConfigError
from fastjepa.profiling.timing import Ceilings, CeilingWork, Timed, Timing
from fastjepa_kernels.selection import OPERATIONS

CPU = torch.device("cpu")
CEILINGS = Ceilings(gigabytes_per_second=10.0, teraflops=0.1)
QUICK = ["--batch_size", "2", "--repeats", "2"]


class KnownCeilings(CeilingWork):
    """Instead of what this machine reaches."""

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


def test_every_operation_has_a_contest() -> None:
    assert set(CONTESTS) == set(OPERATIONS)


def test_only_those_who_are_right_are_timed() -> None:
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
def test_the_table_says_whose_times_these_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_pictures_of_any_table(tmp_path: Path) -> None:
    """Of several models, at the rates of GPUs, with many providers; and of one kind of operation only."""
    base = {"batch_size": 2, "copy_gb_per_s": 3e3, "matmul_tflop_per_s": 800.0, "share_of_bound": 0.5}
    base |= {"p20_ms": 1.0, "p50_ms": 2.0, "p80_ms": 9.0, "bytes": 10}
    attention = [
        {**base, "op": "block_attention", "part": part, "shape": f"{model} {place}", "provider": provider}
        | {"flops": 1000, "gb_per_s": 5.0, "tflop_per_s": 500.0}
        for model in ("S/16", "H/14")
        for place in ("target encoder", "predictor")
        for part in ("forward", "backward")
        for provider in [*(f"fastjepa {i}" for i in range(5)), *(f"rival {i}" for i in range(6))]
    ]
    moving = [
        {**base, "op": "adamw_ema", "part": "step", "shape": "S/16 8 M", "provider": "fastjepa triton"}
        | {"flops": 0, "gb_per_s": 2e3, "tflop_per_s": 0.0}
    ]
    for name, records in (("both", attention + moving), ("attention", attention), ("moving", moving)):
        for plot in (plot_times, plot_roofline):
            plot(records, {"device": "a GPU", "torch": "9.9"}, tmp_path / f"{name}.png")
            assert (tmp_path / f"{name}.png").stat().st_size > 10_000


def test_too_few_rounds_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--repeats", "1"])
    assert "--repeats is 1, expected 2 or more" in capsys.readouterr().err


# Revisions


def git(repository: Path, *arguments: str) -> str:
    options = ["-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(repository), *options, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Without kernels, then with; and changes that are not committed."""
    folder = tmp_path / "repository"
    (folder / "kernels").mkdir(parents=True)
    git(folder, "init", "--quiet")
    git(folder, "commit", "--quiet", "--allow-empty", "--message", "empty")
    (folder / "kernels" / "file.py").write_text("old", encoding="utf-8")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "--message", "kernels")
    (folder / "kernels" / "file.py").write_text("new", encoding="utf-8")
    return folder


def test_a_revision_is_read_and_leaves_nothing_behind(repository: Path) -> None:
    before = git(repository, "status"), git(repository, "worktree", "list")
    found: list[Path] = []

    def fail_with_it() -> None:
        with kernels_of("HEAD", repository) as folder:
            assert (folder / "file.py").read_text(encoding="utf-8") == "old"
            found.append(folder.parent)
            raise KeyError

    with pytest.raises(KeyError):
        fail_with_it()
    assert not found[0].exists()
    assert (git(repository, "status"), git(repository, "worktree", "list")) == before
    assert (repository / "kernels" / "file.py").read_text(encoding="utf-8") == "new"


@pytest.mark.parametrize(
    ("revision", "problem"),
    [
        ("nonsense", "--compare nonsense: no such revision; expected a commit, branch or tag"),
        ("--help", "--compare --help: no such revision"),
        ("HEAD:kernels", "no such revision"),
        ("HEAD~", r"--compare HEAD~: it has no folder kernels/: fatal: .*kernels"),
    ],
)
def test_what_is_no_revision_of_the_kernels_is_refused(repository: Path, revision: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem), kernels_of(revision, repository):
        pass


def test_without_a_checkout_there_are_no_revisions(repository: Path, tmp_path: Path) -> None:
    for folder in (tmp_path, repository / "kernels"):
        with pytest.raises(ConfigError, match=f"{folder} is not a git checkout"), kernels_of("HEAD", folder):
            pass


def test_a_mistaken_revision_is_a_mistake_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*QUICK, "--compare", "no-such-branch"])
    assert ended.value.code == 2
    assert (
        capsys.readouterr()
        .err.strip()
        .splitlines()[-1]
        .startswith("python -m benchmarks.kernels: error: --compare no-")
    )


@pytest.mark.parametrize(
    ("ratios", "verdict"),
    [
        ([0.80, 0.82, 0.78], "faster"),
        ([1.30, 1.25, 1.28], "SLOWER"),
        ([0.99, 0.98, 0.98], "no difference"),  # too little to tell
        ([0.90, 0.80, 1.02], "no difference"),  # the pairs do not agree
        ([0.99, 0.70, 0.85], "no difference"),  # they differ more than the revisions do
        ([1.0, 1.0, 1.0], "no difference"),
    ],
)
def test_a_verdict_needs_pairs_that_agree(ratios: list[float], verdict: str) -> None:
    comparison = compared("contest", "provider", [([2.0, 1.9, 9.0], [2.0 * x, 0.0, 99.0]) for x in ratios])
    assert comparison.ratios == pytest.approx(ratios)
    assert comparison.ratio == pytest.approx(sorted(ratios)[1])
    assert comparison.before == 2.0
    assert comparison.verdict == verdict
    assert f"x {comparison.ratio:.3f} ({min(ratios):.3f}-{max(ratios):.3f})   {verdict}" in str(comparison)


@pytest.fixture
def earlier(tmp_path: Path) -> Callable[[str, str, str], Path]:
    """A repository with these kernels, of which a file was another one in the only revision."""

    def make(name: str, old: str, new: str) -> Path:
        shutil.copytree(
            ROOT / "kernels", tmp_path / "kernels", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
        )
        file = tmp_path / "kernels" / "fastjepa_kernels" / name
        text = file.read_text(encoding="utf-8")
        assert old in text
        file.write_text(text.replace(old, new), encoding="utf-8")
        git(tmp_path, "init", "--quiet")
        git(tmp_path, "add", ".")
        git(tmp_path, "commit", "--quiet", "--message", "earlier")
        return tmp_path

    return make


def test_revisions_take_turns_and_one_that_slept_is_found(
    earlier: Callable[[str, str, str], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compare, "PAIRS", 1)
    repository = earlier(
        "target_loss.py",
        "def _target_loss_torch(",
        "def _target_loss_torch(*args):\n    __import__('time').sleep(0.05)\n    return _awake(*args)\n\n\ndef _awake(",
    )
    comparisons, remarks = compare.compare("HEAD", Choice(["target_loss"], ["S/16"], 2, "fp32"), 3, repository)
    assert remarks == []
    verdicts = {comparison.contest: (comparison.provider, comparison.verdict) for comparison in comparisons}
    assert verdicts["target_loss, forward, S/16"] == ("fastjepa torch", "faster")
    assert set(verdicts) == {"target_loss, forward, S/16", "target_loss, backward, S/16"}
    compare.report(comparisons, ["a remark"], "HEAD")
    printed = capsys.readouterr().out
    assert "pair 1 of 1 is done" in printed
    assert "a remark" in printed
    assert "the working tree against HEAD: " in printed


def test_a_revision_that_is_wrong_is_not_compared(
    earlier: Callable[[str, str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "PAIRS", 1)
    repository = earlier("target_loss.py", "F.smooth_l1_loss(", "2 * F.smooth_l1_loss(")
    comparisons, remarks = compare.compare("HEAD", Choice(["target_loss"], ["S/16"], 2, "fp32"), 2, repository)
    assert comparisons == []
    assert (
        "target_loss, forward, S/16: fastjepa torch: HEAD: output 0: relative error 1.0e+00 is above 1e-03" in remarks
    )


def test_a_revision_that_does_not_start_is_told_with_its_last_words(earlier: Callable[[str, str, str], Path]) -> None:
    repository = earlier("__init__.py", "__all__ = [", "raise ImportError('from an earlier time')\n__all__ = [")
    with pytest.raises(ConfigError, match=r"with the kernels of HEAD; its last words:\n(.*\n)*.*from an earlier time"):
        compare.compare("HEAD", Choice(["mask_sampling"], ["S/16"], 2, "fp32"), 2, repository)


def test_an_installed_package_does_not_fill_the_gaps_of_a_revision(earlier: Callable[[str, str, str], Path]) -> None:
    """As the finder of an editable installation does."""
    installed = ROOT / "kernels" / "fastjepa_kernels"
    first = "from fastjepa_kernels.adamw_ema import"
    repository = earlier("__init__.py", first, f"__path__.insert(0, {str(installed)!r})\n{first}")
    with pytest.raises(ConfigError, match=rf"kernels has no fastjepa_kernels\.\w+: it was found in {installed}"):
        compare.compare("HEAD", Choice(["mask_sampling"], ["S/16"], 2, "fp32"), 2, repository)
