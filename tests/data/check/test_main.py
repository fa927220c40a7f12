"""The command line: its settings, its errors and its help."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastjepa.data.check.__main__ import main
from tests.support.check_images import PHOTO, write

Report = dict[str, Any]


@pytest.mark.parametrize("arguments", [["--num_threads", "1"], ["--num_threads", "5", "--max_pixels", "5000"]])
def test_the_command_line_sets_threads_and_max_pixels(
    tmp_path: Path, run: Callable[..., tuple[int, Report]], arguments: list[str]
) -> None:
    status, report = run(write(tmp_path / "images", {f"{i}.jpg": PHOTO for i in range(9)}), *arguments)
    assert len(report["splits"]["train"]["bad"]) == (9 if "--max_pixels" in arguments else 0)
    assert status == ("--max_pixels" in arguments)
    assert report["num_threads"] == int(arguments[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{folder}/nowhere"], "fastjepa: error: data.source = {folder}/nowhere: No such file or folder"),
        (
            ["{folder}", "--split", "val"],
            "fastjepa: error: data.source = {folder}: it has no split val; check it without --split",
        ),
        (["{folder}", "--max_pixels", "0"], "fastjepa: error: data.max_pixels = 0: expected a positive number"),
        (["{folder}", "--json", "{folder}/no/x.json"], "fastjepa: error: --json {folder}/no/x.json: cannot be written"),
    ],
)
def test_errors_are_named_without_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    write(tmp_path, {"1.jpg": PHOTO})
    assert main([argument.format(folder=tmp_path) for argument in arguments]) == 2
    output = capsys.readouterr()
    assert output.err.startswith(message.format(folder=tmp_path))
    assert output.out == ""


def test_help_names_every_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Exit status: 0: no image is bad; 1: some are; 2: an error; 130: stopped with Ctrl-C" in text


@pytest.mark.processes
def test_the_module_and_the_command_run_the_check(tmp_path: Path) -> None:
    folder = write(tmp_path / "images", {"1.jpg": PHOTO, "2.jpg": b""})
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    for command in (["fastjepa.data.check"], ["fastjepa", "check"]):
        done = subprocess.run(
            [sys.executable, "-m", *command, str(folder), "--headers"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 1
        assert "2.jpg: empty file" in done.stdout
