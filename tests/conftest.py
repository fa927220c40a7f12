"""Shared by all tests: GPU tests are skipped, with the reason, where there is no GPU."""

import os
from collections.abc import Callable, Iterator

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
    """For a test that injected a fault: fault, what happened, what was lost. See tests/reliability.py."""
    return lambda fault, happened, lost: record_property("fault", (fault, happened, lost))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
