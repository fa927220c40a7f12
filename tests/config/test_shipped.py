"""Shipped configurations are found by name; a file of the user's own of that name goes first."""

from pathlib import Path

import pytest

from fastjepa.config.shipped import DEFAULT_CONFIG, SHIPPED, find_config, shipped_names
from fastjepa.errors import ConfigError
from fastjepa.objectives.registry import load_config

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes an empty folder outside the repository the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_shipped_folder_is_the_repositorys() -> None:
    assert CONFIGS.resolve() == SHIPPED
    assert DEFAULT_CONFIG.is_file()
    assert {"debug", "default", "in1k_vitb16_ep600"} <= set(shipped_names())


@pytest.mark.parametrize("name", ["debug", "debug.yaml", "configs/debug.yaml", "configs/debug", "./configs/debug.yaml"])
def test_a_shipped_run_is_found_by_its_name(name: str) -> None:
    assert find_config(name) == SHIPPED / "debug.yaml"


@pytest.mark.parametrize("name", ["zero2", "zero2.json", "configs/zero2.json"])
def test_a_shipped_deepspeed_file_is_found_by_its_name(name: str) -> None:
    assert find_config(name) == SHIPPED / "zero2.json"


@pytest.mark.parametrize("name", ["debug.yaml", "configs/debug.yaml", "debug"])
def test_a_file_of_the_user_goes_before_a_shipped_one(name: str, elsewhere: Path) -> None:
    (elsewhere / name).parent.mkdir(exist_ok=True)
    (elsewhere / name).touch()
    assert find_config(name) == Path(name)


def test_a_folder_does_not_hide_a_shipped_run(elsewhere: Path) -> None:
    (elsewhere / "debug").mkdir()
    assert find_config("debug") == SHIPPED / "debug.yaml"


@pytest.mark.parametrize(
    "name", ["", ".", "configs", "mine.yaml", "runs/debug.yaml", "/debug.yaml", "../configs/debug.yaml"]
)
def test_other_paths_are_left_as_they_are(name: str) -> None:
    assert find_config(name) == Path(name)


def test_a_misspelt_name_leads_to_the_shipped_run() -> None:
    with pytest.raises(ConfigError, match=r"^debgu: cannot be read .*; did you mean debug\?$"):
        load_config(find_config("debgu"))
