"""The versions, sources and settings that the ranks compare: what must differ differs, and what may not does not."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from fastjepa.launch import versions
from fastjepa.launch.versions import versions_and_settings
from tests.support.small import small_config


def differing(first: dict[str, str], second: dict[str, str]) -> set[str]:
    assert first.keys() == second.keys()
    return {name for name in first if first[name] != second[name]}


def test_a_setting_that_differs_is_named_with_its_section() -> None:
    config = small_config()
    facts = versions_and_settings(config, None)
    assert versions_and_settings(small_config(), None) == facts
    other = replace(config, seed=config.seed + 1, model=replace(config.model, depth=4))
    assert differing(facts, versions_and_settings(other, None)) == {"seed", "model.depth"}
    assert facts["model.depth"] == "3"


def test_a_deepspeed_configuration_is_compared_by_its_content(tmp_path: Path) -> None:
    """The path may differ from machine to machine."""
    config = small_config()
    for name, content in {"a": "{}", "same": "{}", "other": '{"zero_optimization": {"stage": 2}}'}.items():
        (tmp_path / name).write_text(content)
    a, same, other, absent = (
        versions_and_settings(config, tmp_path / name) for name in ("a", "same", "other", "absent")
    )
    assert a == same
    assert differing(a, other) == differing(a, absent) == {"--ds_config"}
    assert versions_and_settings(config, None)["--ds_config"] == "not given"
    assert "deepspeed" in a
    assert "deepspeed" not in versions_and_settings(config, None)  # a rank that does not use it need not have it


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "a_package_of_the_test"
    (folder / "inner").mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / "inner" / "module.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield folder
    sys.modules.pop(folder.name, None)


def test_sources_differ_when_a_line_or_the_name_of_a_file_does(package: Path) -> None:
    hashes = [versions._hash_of_sources(package.name)]
    (package / "inner" / "module.py").write_text("x = 2\n")
    hashes.append(versions._hash_of_sources(package.name))
    (package / "inner" / "module.py").rename(package / "inner" / "renamed.py")
    hashes.append(versions._hash_of_sources(package.name))
    assert len(set(hashes)) == 3
    (package / "notes.txt").write_text("no source")
    assert versions._hash_of_sources(package.name) == hashes[-1]


def test_a_package_that_is_not_installed_is_a_fact_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(versions, "version", missing)
    assert versions_and_settings(small_config(), None)["triton"] == "not installed"
