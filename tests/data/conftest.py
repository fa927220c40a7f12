"""Small configurations, image folders and photographs for the data tests."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastjepa.config import Config, DataConfig, ModelConfig
from fastjepa.data.decode.dali import dali_problem
from fastjepa.objectives.ijepa.block_sizes import MaskConfig
from fastjepa.objectives.ijepa.settings import IJEPAConfig
from tests.support.image_files import Pixels

NEEDS_DALI = pytest.mark.skipif(dali_problem() is not None, reason=str(dali_problem()))


@pytest.fixture(params=["turbo", pytest.param("dali", marks=NEEDS_DALI)])
def loader_name(request: pytest.FixtureRequest) -> str:
    """The value of data.loader for each decoder in turn; DALI only where it is installed."""
    return str(request.param)


@pytest.fixture
def make_config() -> Callable[..., Config]:
    """Makes the configuration of a run on 32 x 32 grey images and a 4 x 4 grid; keywords go to DataConfig."""

    def make(**data: object) -> Config:
        settings = {"image_size": 32, "in_channels": 1, "mean": (0.5,), "std": (0.25,), "num_threads": 2, **data}
        settings.setdefault("max_bad_share", 1.0)
        return Config(
            seed=7,
            data=DataConfig(**settings),  # type: ignore[arg-type]
            model=ModelConfig(name="vit_tiny", patch_size=8),
            objective=IJEPAConfig(masks=MaskConfig(min_keep=5)),
        )

    return make


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder for each test."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("FASTJEPA_CACHE", str(folder))
    return folder


@pytest.fixture
def image_folder(tmp_path: Path) -> Callable[..., Path]:
    """Writes n grey PNG files of different sizes and pixels, `images/000.png`, ...; returns the folder."""

    def write(n: int) -> Path:
        folder = tmp_path / "images"
        folder.mkdir()
        rng = np.random.default_rng(0)
        for i in range(n):
            pixels = rng.integers(0, 256, (40 + i % 7, 40 + i % 5), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i:03d}.png")
        return folder

    return write


@pytest.fixture(scope="session")
def photograph() -> Pixels:
    """A photograph, uint8 [427, 640, 3]."""
    datasets = pytest.importorskip("sklearn.datasets", reason="needs scikit-learn's sample photographs")
    return np.asarray(datasets.load_sample_images().images[0], np.uint8)


@pytest.fixture(scope="session")
def write_invalid_name() -> Callable[[Path, bytes], bytes]:
    """Moves a file to a name that is not UTF-8, or skips where the file system has no such names."""

    def move(path: Path, name: bytes) -> bytes:
        target = os.fsencode(path.parent) + b"/" + name
        try:
            os.rename(os.fsencode(path), target)  # noqa: PTH104 (bytes names)
        except OSError as error:
            pytest.skip(f"the file system refuses names that are not UTF-8: {error}")
        return target

    return move
