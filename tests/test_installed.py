"""An installed fastjepa works from any folder: installed as the README says, and as a wheel without the repository.

Nothing is downloaded: each environment is new, and sees the packages of the one that runs the tests, except fastjepa.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import fastjepa
from benchmarks.launch import ROOT

pytestmark = pytest.mark.processes

# What a build reads. Copied, so that it leaves nothing in the repository.
SOURCES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "src", "fastjepa", "kernels", "configs")
OFFLINE = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check")


def copy_of_repository(folder: Path) -> Path:
    folder.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignore)
        else:
            shutil.copy(ROOT / name, folder)
    return folder


def new_environment(folder: Path) -> Path:
    """Returns its folder of programs."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    paths = {"base": str(folder), "platbase": str(folder)}
    packages = Path(sysconfig.get_path("purelib", "venv", paths))
    outer = [entry for entry in sys.path if entry.endswith(("site-packages", "dist-packages"))]
    (packages / "outer.pth").write_text("".join(f"{entry}\n" for entry in outer))  # runs no .pth of theirs
    return Path(sysconfig.get_path("scripts", "venv", paths))


def output_of(folder: Path, *command: str | Path) -> str:
    """Output of a command that is started in `folder`; it must end with 0."""
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def install(programs: Path, *what: str | Path) -> None:
    # The environment's own pip is the outer one's, which must leave the outer fastjepa where it is: --ignore-installed.
    output_of(programs, programs / "python", "-m", "pip", "install", *OFFLINE, "--ignore-installed", *what)


@pytest.fixture(scope="module")
def above(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that contains the clone, which is named fastjepa."""
    folder = tmp_path_factory.mktemp("above")
    copy_of_repository(folder / "fastjepa")
    return folder


@pytest.fixture(scope="module")
def editable(above: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Programs of an environment in which the clone is installed as the README says."""
    programs = new_environment(tmp_path_factory.mktemp("editable") / "venv")
    install(programs, "--editable", above / "fastjepa")
    return programs


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Programs of an environment in which a wheel is installed, whose repository is gone."""
    repository = copy_of_repository(tmp_path_factory.mktemp("built") / "fastjepa")
    programs = new_environment(tmp_path_factory.mktemp("wheel") / "venv")
    output_of(repository, sys.executable, "-m", "pip", "wheel", *OFFLINE, "--wheel-dir", repository.parent, ".")
    (built,) = repository.parent.glob("*.whl")
    shutil.rmtree(repository)
    install(programs, built)
    return programs


def configurations(folder: Path) -> dict[Path, str]:
    """Each file by its path in the folder, and its text."""
    return {
        file.relative_to(folder): file.read_text() for kind in ("yaml", "json") for file in folder.rglob(f"*.{kind}")
    }


WHERE = "import fastjepa, fastjepa_kernels, importlib.metadata as m; print(fastjepa.__version__, m.version('fastjepa'))"


def test_the_clone_is_imported_from_the_folder_that_contains_it(above: Path, editable: Path) -> None:
    assert output_of(above, editable / "python", "-c", WHERE).split() == [fastjepa.__version__] * 2


def test_an_edit_of_the_clone_is_seen_without_another_installation(above: Path, editable: Path) -> None:
    added = above / "fastjepa" / "fastjepa" / "added.py"
    added.write_text("WORD = 'seen'")
    try:
        assert output_of(above, editable / "python", "-c", "import fastjepa.added as a; print(a.WORD)") == "seen\n"
    finally:
        added.unlink()


@pytest.mark.parametrize("folder", ["kernels", "tests", "benchmarks", "configs"])
def test_an_installation_makes_nothing_else_importable(folder: str, editable: Path, tmp_path: Path) -> None:
    """transformers, for one, looks for a package named kernels."""
    found = f"import importlib.util as u; print(getattr(u.find_spec({folder!r}), 'submodule_search_locations', None))"
    assert "fastjepa" not in output_of(tmp_path, editable / "python", "-c", found)


def test_the_doctor_finds_nothing_wrong_from_the_folder_that_contains_the_clone(above: Path, editable: Path) -> None:
    said = output_of(above, editable / "fastjepa", "doctor", "--config", "debug")
    assert "cannot be imported" not in said
    assert "Verdict: " in said


def test_a_run_is_trained_and_evaluated_from_the_folder_that_contains_the_clone(above: Path, editable: Path) -> None:
    train = ["fastjepa/fastjepa/train.py", "--config", "fastjepa/configs/debug.yaml", "output_dir=run"]
    output_of(above, editable / "python", *train)
    assert "k-NN" in output_of(above, editable / "python", "-m", "fastjepa.evaluate", "run")


def test_a_wheel_trains_a_shipped_configuration_outside_the_repository(wheel: Path, tmp_path: Path) -> None:
    where = output_of(tmp_path, wheel / "python", "-c", "import fastjepa; print(fastjepa.__file__)")
    assert Path(where).is_relative_to(wheel.parent)
    files = ["--config", "configs/debug.yaml", "--ds_config", "configs/zero2.json"]
    output_of(tmp_path, wheel / "fastjepa", "train", *files)
    assert (tmp_path / "runs/debug/checkpoints/step_00000020").is_dir()


def test_a_wheel_holds_every_configuration(wheel: Path, tmp_path: Path) -> None:
    shipped = output_of(tmp_path, wheel / "python", "-c", "import fastjepa.config.shipped as s; print(s.SHIPPED)")
    assert configurations(Path(shipped.strip())) == configurations(ROOT / "configs")
    default = output_of(tmp_path, wheel / "fastjepa", "train", "--print_config")
    assert "output_dir: runs/default\n" in default


def test_a_checkout_that_is_not_installed_knows_its_version(tmp_path: Path) -> None:
    """-S: without site-packages, so that torch would not be found, nor what an installation left there."""
    found = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import fastjepa; print(fastjepa.__version__)"
    assert output_of(tmp_path, sys.executable, "-S", "-c", found) == f"{fastjepa.__version__}\n"


def test_a_build_takes_the_version_from_the_package(wheel: Path, tmp_path: Path) -> None:
    assert output_of(tmp_path, wheel / "python", "-c", WHERE).split() == [fastjepa.__version__] * 2
