"""The report as text and as JSON."""

from __future__ import annotations

import json

from fastjepa.doctor.diagnosis import Finding, Report, format_report
from fastjepa.doctor.suggest import Suggestion


def full_report() -> Report:
    return Report(
        installation=[Finding("PyTorch", "ok", "2.13.0"), Finding("apex", "warning", "not NVIDIA's", "uninstall it")],
        run=[Finding("data", "problem", "word " * 60, "look there")],
        verdict="limited by the step",
        duration="1 epoch takes 2 hours",
        suggestions=[Suggestion("data.num_threads", 8, "measured")],
        command="python fastjepa/train.py data.num_threads=8",
        yaml="data:\n  num_threads: 8\n",
    )


def test_the_text_has_every_finding_suggestion_and_the_command() -> None:
    lines = format_report(full_report()).splitlines()
    assert "  ok       PyTorch              2.13.0" in lines
    assert lines[lines.index("  warning  apex                 not NVIDIA's") + 1].strip() == "-> uninstall it"
    assert any(line.startswith("  PROBLEM  data ") for line in lines)
    assert "Verdict: limited by the step." in lines
    assert "1 epoch takes 2 hours." in lines
    assert "  data.num_threads=8: measured" in lines
    assert "      num_threads: 8" in lines
    assert "To start the run, once the problems are solved:" in lines
    assert lines[-1] == "1 problem found: the run would not start, or give wrong results"
    assert max(map(len, lines)) <= 118


def test_what_is_unknown_is_left_out_of_the_text() -> None:
    text = format_report(Report(installation=[Finding("PyTorch", "ok", "2.13.0")], verdict="unknown"))
    assert "The run" not in text
    assert "Settings to change" not in text
    assert "To start" not in text
    assert text.endswith("no problems found")


def test_the_report_is_json_with_the_number_of_problems() -> None:
    report = json.loads(json.dumps(full_report().as_dict()))
    assert report["problems"] == 1
    assert report["suggestions"] == [{"key": "data.num_threads", "value": 8, "reason": "measured"}]
