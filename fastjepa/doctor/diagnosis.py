"""The result of an examination: findings, verdict and suggestions, as text for people and as JSON for programs."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from fastjepa.doctor.suggest import Suggestion

_WIDTH, _NAME_WIDTH = 118, 21
_LEVELS = {"ok": "ok", "warning": "warning", "problem": "PROBLEM"}

Level = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    name: str
    level: Level
    """problem: the run would not start, or give wrong results. warning: it would be slower, or may end early."""
    found: str
    advice: str = ""
    """What was expected, and what to do."""


@dataclass(frozen=True, kw_only=True)
class Report:
    installation: list[Finding]
    run: list[Finding] = field(default_factory=list)
    verdict: str
    duration: str | None = None
    """How long the run takes with the suggestions, as a sentence; None: unknown."""
    limit: str | None = None
    """loader, step, cores, communication or memory; None: unknown."""
    suggestions: list[Suggestion] = field(default_factory=list)
    command: str | None = None
    """The command that starts the run with the suggestions."""
    yaml: str = ""
    """The suggestions as lines of the configuration's file."""
    facts: dict[str, Any] = field(default_factory=dict)
    """All figures, measured and estimated."""

    @property
    def problems(self) -> int:
        return sum(finding.level == "problem" for finding in (*self.installation, *self.run))

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"problems": self.problems}


def format_report(report: Report) -> str:
    lines = ["The installation", *_table(report.installation)]
    if report.run:
        lines += ["", "The run", *_table(report.run)]
    lines += ["", *textwrap.wrap(f"Verdict: {report.verdict}.", _WIDTH)]
    if report.duration:
        lines.append(f"{report.duration}.")
    if report.suggestions:
        lines += ["", "Settings to change"]
        for suggestion in report.suggestions:
            lines += _paragraph(f"  {suggestion.argument}: {suggestion.reason}", "    ")
        if report.yaml:
            lines += ["", "  As lines of the run's YAML file:", "", textwrap.indent(report.yaml.rstrip(), "    ")]
    if report.command:
        once = ", once the problems are solved" if report.problems else ""
        lines += ["", f"To start the run{once}:", "", f"    {report.command}"]
    count = report.problems
    found = f"{count} problem{'s' * (count != 1)} found: the run would not start, or give wrong results"
    lines += ["", found if count else "no problems found"]
    return "\n".join(lines)


def _table(findings: Sequence[Finding]) -> Iterator[str]:
    for finding in findings:
        head = f"  {_LEVELS[finding.level]:<9}{finding.name:<{_NAME_WIDTH}}"
        yield from _paragraph(head + finding.found, " " * (11 + _NAME_WIDTH))
        if finding.advice:
            yield from _paragraph(" " * (11 + _NAME_WIDTH) + f"-> {finding.advice}", " " * (14 + _NAME_WIDTH))


def _paragraph(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
