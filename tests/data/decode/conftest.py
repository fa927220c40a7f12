"""Photographs for the tests of the decoders."""

from pathlib import Path

import pytest
from PIL import Image

from tests.support.image_files import Pixels


@pytest.fixture
def photos(tmp_path: Path, photograph: Pixels) -> dict[str, Path]:
    """The photograph as a PNG and a JPEG file, by suffix."""
    for suffix in ("png", "jpg"):
        Image.fromarray(photograph).save(tmp_path / f"photo.{suffix}")
    return {suffix: tmp_path / f"photo.{suffix}" for suffix in ("png", "jpg")}
