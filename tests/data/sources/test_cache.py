"""The cache folder: its place, and the temporary folders in it."""

from pathlib import Path

import pytest

from fastjepa.data.sources.cache import cache_folder, temporary_folder


def test_the_cache_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTJEPA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "fastjepa"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "fastjepa"
    monkeypatch.setenv("FASTJEPA_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"


def test_a_temporary_folder_is_removed_unless_it_was_renamed(tmp_path: Path) -> None:
    final = tmp_path / "deep" / "final"
    with temporary_folder(final) as folder:
        (folder / "file").touch()
    assert list(final.parent.iterdir()) == []
    with temporary_folder(final) as folder:
        assert folder.parent == final.parent
        assert folder.name.startswith(".")
        (folder / "file").touch()
        folder.rename(final)
    assert [path.name for path in final.parent.iterdir()] == ["final"]
    assert (final / "file").exists()
