"""What holds the repository together outside its packages: .ci/check_files.py and CITATION.cff."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from benchmarks.launch import ROOT


@pytest.fixture(scope="module")
def check_files() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_files", ROOT / ".ci" / "check_files.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("folder", ["home/ann", "Users/ann", "tmp/run", "root"])
def test_a_private_path_is_named_with_its_line(folder: str, check_files: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(f"seed: 1\noutput_dir: /{folder}/x # mine\n")
    (problem,) = check_files.problems(file)
    assert problem.startswith(f"{file}, line 2: /{folder}/x: ")


@pytest.mark.parametrize(
    "text", ["{}/home/x", "data/tmp/x", "~/tmp/x", "/data/photos", "/rooted", "/tmpfs/x", "/home", "/tmp"]
)
def test_other_paths_are_allowed(text: str, check_files: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "file.py"
    file.write_text(f'"{text}"\n')
    assert not list(check_files.problems(file))


def test_a_large_file_is_refused(check_files: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "weights.bin"
    file.write_bytes(bytes(2 * 2**20))
    assert list(check_files.problems(file)) == [f"{file}: 2,048 KiB: expected at most 1,024 KiB"]
    assert check_files.main([str(file)]) == 1


def test_the_citation_names_the_software_and_the_paper() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert "version" not in citation  # it stands in fastjepa/__init__.py alone
    (paper,) = citation["references"]
    assert (len(paper["authors"]), paper["year"], paper["doi"]) == (8, 2023, "10.1109/CVPR52729.2023.01499")
