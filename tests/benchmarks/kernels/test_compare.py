"""benchmarks.kernels --compare reads another git revision, compares it fairly, and leaves the repository alone."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.kernel_cases import Choice
from benchmarks.kernels import compare
from benchmarks.kernels.__main__ import main
from benchmarks.kernels.compare import compared, kernels_of
from benchmarks.launch import ROOT
from fastjepa.errors import ConfigError


def git(repository: Path, *arguments: str) -> str:
    options = ["-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(repository), *options, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository whose first commit has no kernels, whose second has, and whose working tree has changes."""
    folder = tmp_path / "repository"
    (folder / "kernels").mkdir(parents=True)
    git(folder, "init", "--quiet")
    git(folder, "commit", "--quiet", "--allow-empty", "--message", "empty")
    (folder / "kernels" / "file.py").write_text("old", encoding="utf-8")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "--message", "kernels")
    (folder / "kernels" / "file.py").write_text("new", encoding="utf-8")
    return folder


@pytest.mark.processes
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


@pytest.mark.processes
@pytest.mark.parametrize(
    ("revision", "problem"),
    [
        ("nonsense", "--compare nonsense: no such revision; expected a commit, branch or tag"),
        ("--help", "--compare --help: no such revision"),
        ("HEAD:kernels", "no such revision"),
        ("HEAD~", r"--compare HEAD~: it has no folder kernels/: fatal: .*kernels"),
    ],
)
def test_a_revision_without_kernels_or_none_at_all_is_refused(repository: Path, revision: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem), kernels_of(revision, repository):
        pass


@pytest.mark.processes
def test_without_a_checkout_there_are_no_revisions(repository: Path, tmp_path: Path) -> None:
    for folder in (tmp_path, repository / "kernels"):
        with pytest.raises(ConfigError, match=f"{folder} is not a git checkout"), kernels_of("HEAD", folder):
            pass


@pytest.mark.processes
def test_an_unknown_revision_is_an_error_of_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--batch_size", "2", "--repeats", "2", "--compare", "no-such-branch"])
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
        ([0.99, 0.98, 0.98], "no difference"),  # too small a difference
        ([0.90, 0.80, 1.02], "no difference"),  # the pairs disagree
        ([0.99, 0.70, 0.85], "no difference"),  # the pairs differ more than the revisions do
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
    """Make a repository with today's kernels, except that its only revision has another text in one file."""

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


@pytest.mark.processes
def test_a_revision_that_sleeps_is_found_to_be_slower(
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
    compare.print_comparison(comparisons, ["a remark"], "HEAD")
    printed = capsys.readouterr().out
    assert "pair 1 of 1 is done" in printed
    assert "a remark" in printed
    assert "the working tree against HEAD: " in printed


@pytest.mark.processes
def test_a_revision_with_wrong_answers_is_not_compared(
    earlier: Callable[[str, str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "PAIRS", 1)
    repository = earlier("target_loss.py", "F.smooth_l1_loss(", "2 * F.smooth_l1_loss(")
    comparisons, remarks = compare.compare("HEAD", Choice(["target_loss"], ["S/16"], 2, "fp32"), 2, repository)
    assert comparisons == []
    assert (
        "target_loss, forward, S/16: fastjepa torch: HEAD: output 0: relative error 1.0e+00 is above 1e-03" in remarks
    )


@pytest.mark.processes
def test_the_error_of_a_revision_that_does_not_start_has_its_output(earlier: Callable[[str, str, str], Path]) -> None:
    repository = earlier("__init__.py", "__all__ = [", "raise ImportError('from an earlier time')\n__all__ = [")
    with pytest.raises(
        ConfigError, match=r"with the kernels of HEAD; the process wrote:\n(.*\n)*.*from an earlier time"
    ):
        compare.compare("HEAD", Choice(["mask_sampling"], ["S/16"], 2, "fp32"), 2, repository)


@pytest.mark.processes
def test_an_installed_package_does_not_fill_the_gaps_of_a_revision(earlier: Callable[[str, str, str], Path]) -> None:
    """The finder of an editable installation fills them in the same way."""
    installed = ROOT / "kernels" / "fastjepa_kernels"
    first = "from fastjepa_kernels.selection import"
    repository = earlier("__init__.py", first, f"__path__.insert(0, {str(installed)!r})\n{first}")
    with pytest.raises(ConfigError, match=rf"kernels has no fastjepa_kernels\.\w+: it was found in {installed}"):
        compare.compare("HEAD", Choice(["mask_sampling"], ["S/16"], 2, "fp32"), 2, repository)
