"""A shard for the tests of the sources."""

import tarfile
from pathlib import Path

import pytest

from tests.support.shards import IMAGES, write_shard


@pytest.fixture
def shard_of_four(tmp_path: Path) -> Path:
    """A shard of the four images of `IMAGES`, which take 512 + 1024 bytes each."""
    return write_shard(tmp_path / "broken.tar", IMAGES, tarfile.GNU_FORMAT)
