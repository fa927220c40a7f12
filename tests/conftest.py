"""Shared by all tests: those of GPUs run with `pytest -m gpu` only, and from all others the GPUs are hidden."""

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

# Tests run side by side and start processes of their own: threads beyond the cores make steps ten times slower.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session", autouse=True)
def own_cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Lists of images and unpacked data sets go there, not to the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTJEPA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def record(record_property: Callable[[str, object], None]) -> Callable[[str, str, str], None]:
    """Record a fault that a test injected, what happened and what was lost. See tests/support/reliability.py."""
    return lambda fault, happened, lost: record_property("fault", (fault, happened, lost))


@pytest.fixture
def read_only_folder() -> Iterator[Path]:
    """Which nobody may write to. Root may write anywhere, and is somebody else as long as the test lasts."""
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o555)
        os.seteuid(user or 65534)
        try:
            yield folder
        finally:
            os.seteuid(user)
            folder.chmod(0o700)


def pytest_configure(config: pytest.Config) -> None:
    """The tests of runs, in this process or in those that they start, are about runs on CPUs."""
    if not config.option.markexpr.startswith("gpu"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and pytest -m gpu"))
