"""The one command line: fastjepa COMMAND."""

from __future__ import annotations

import pytest

import fastjepa.__main__ as command_line
from benchmarks.launch import ROOT


@pytest.mark.parametrize("command", ["train", "plan", "check", "doctor"])
def test_each_command_has_its_own_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        command_line.main([command, "--help"])
    assert end.value.code == 0
    assert command in capsys.readouterr().out.partition("\n")[0]


def test_an_unknown_or_missing_command_is_an_error_that_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["trian"]) == 2
    assert "trian: expected one of train, doctor, plan, check, evaluate" in capsys.readouterr().err
    assert command_line.main([]) == 2
    assert "usage: fastjepa COMMAND" in capsys.readouterr().err
    assert command_line.main(["--help"]) == 0
    assert "usage: fastjepa COMMAND" in capsys.readouterr().out


def test_options_before_the_command_are_passed_on_to_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["--local_rank=0", "train", "--print_config", "seed=7"]) == 0
    assert "seed: 7" in capsys.readouterr().out


def test_every_command_has_a_module_and_the_script_is_installed() -> None:
    script = (ROOT / "setup.py").read_text()
    assert '"fastjepa=fastjepa.__main__:main"' in script
    for module, _ in command_line.COMMANDS.values():
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file()
