"""Progress on the terminal: a bar, or plain lines where the output goes to a file."""

from __future__ import annotations

import io
import re
import sys

import pytest

from fastjepa.run.progress import Progress

LINE = {"step": 3, "loss": 0.51234, "lr": 1e-3, "images_per_second": 12345.6, "data_wait": 0.126}
FIGURES = re.escape("loss 0.5123  lr 1.00e-03  12,346 images/s  data wait 13%")


def test_progress_is_plain_lines_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(2, 10, enabled=True)
    progress.advance()
    progress.report(LINE)
    progress.close()
    assert re.fullmatch(rf"step 3/10  {FIGURES}  \d+:\d\d:\d\d left\n", capsys.readouterr().err)


def test_the_time_left_follows_from_the_steps_of_this_process_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run was resumed at step 900 and did 10 steps in 400 s: the 90 that are left take an hour."""
    clock = 100.0
    monkeypatch.setattr("fastjepa.run.progress.time.perf_counter", lambda: clock)
    progress = Progress(900, 1000, enabled=True)
    clock = 500.0
    progress.report({**LINE, "step": 910})
    assert capsys.readouterr().err.endswith("  1:00:00 left\n")


def test_progress_is_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    progress = Progress(2, 10, enabled=True)
    progress.advance()
    progress.report(LINE)
    progress.close()
    assert re.search(rf"3/10 \[.*{FIGURES}", terminal.getvalue())


def test_a_line_without_a_finite_loss_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    Progress(2, 10, enabled=True).report({**LINE, "loss": None})
    assert "loss nan  lr " in capsys.readouterr().err


def test_all_ranks_but_the_first_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(0, 10, enabled=False)
    progress.advance()
    progress.report(LINE)
    progress.close()
    assert capsys.readouterr() == ("", "")
