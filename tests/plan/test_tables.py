"""The tables of docs/plan.md are those that the formulas give."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.launch import ROOT
from fastjepa.errors import ConfigError
from fastjepa.plan.tables import write_tables


def test_the_tables_of_the_documentation_are_up_to_date(tmp_path: Path) -> None:
    """If this fails, run python -m fastjepa.plan --table docs/plan.md."""
    documentation = (ROOT / "docs" / "plan.md").read_text(encoding="utf-8")
    copy = tmp_path / "plan.md"
    copy.write_text(documentation, encoding="utf-8")
    write_tables(copy)
    assert copy.read_text(encoding="utf-8") == documentation


def test_a_file_without_places_for_the_tables_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    other = tmp_path / "other.md"
    other.write_text("# Other\n")
    with pytest.raises(ConfigError, match=r"--table .*other\.md: expected the lines <!-- table a100 -->"):
        write_tables(other)
    assert other.read_text() == "# Other\n"


def test_a_file_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--table .*missing\.md: No such file or directory"):
        write_tables(tmp_path / "missing.md")
