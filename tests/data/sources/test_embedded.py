"""The embedded data set is complete and is unpacked once, whatever happens to processes, disks and caches."""

import lzma
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fastjepa.data.sources.embedded as embedded
from fastjepa.config import DataConfig
from fastjepa.data import DataError, open_dataset


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder into which two processes have unpacked the set at the same time."""
    folder = tmp_path_factory.mktemp("cache")
    environment = {
        **os.environ,
        "FASTJEPA_CACHE": str(folder),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    command = [sys.executable, "-c", "from fastjepa.data.sources.embedded import fashion_mnist; print(fashion_mnist())"]
    racers = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [racer.communicate(timeout=300)[0].strip() for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0]
    assert outputs == [str(folder / "fashion_mnist_10k")] * 2
    return folder


@pytest.mark.processes
def test_a_race_leaves_one_folder_and_nothing_else(cache: Path) -> None:
    assert [path.name for path in cache.iterdir()] == ["fashion_mnist_10k"]


@pytest.mark.processes
def test_all_images_are_there_with_their_labels(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTJEPA_CACHE", str(cache))
    for split, per_class in (("train", 800), ("val", 200)):
        dataset = open_dataset(DataConfig(source="fashion_mnist"), split)  # type: ignore[arg-type]
        assert dataset is not None
        assert dataset.labels is not None
        assert len(dataset.class_names) == 10
        assert np.bincount(dataset.labels).tolist() == [per_class] * 10


@pytest.mark.processes
def test_pixels_are_those_of_the_packed_file(cache: Path) -> None:
    packed = Path(embedded.__file__).parents[1] / "embedded" / "fashion_mnist_10k.bin.xz"
    data = lzma.decompress(packed.read_bytes())
    labels, images = data[12:10_012], data[10_012:]
    assert data[:12] == b"FM10" + (8000).to_bytes(4, "little") + (2000).to_bytes(4, "little")
    trousers = [index for index, label in enumerate(labels) if label == 1]  # 800 of train, then 200 of val
    for file, index in (("train/Trouser/00017.png", trousers[17]), ("val/Trouser/00199.png", trousers[999])):
        with Image.open(cache / "fashion_mnist_10k" / file) as image:
            assert image.size == (28, 28)
            assert image.tobytes() == images[index * 784 : (index + 1) * 784]


@pytest.mark.processes
def test_the_set_is_not_unpacked_twice(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTJEPA_CACHE", str(cache))
    monkeypatch.setattr(embedded, "_unpack", lambda folder: pytest.fail("unpacked again"))
    assert embedded.fashion_mnist() == cache / "fashion_mnist_10k"


@pytest.mark.processes
def test_missing_images_are_noticed(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTJEPA_CACHE", str(cache))
    lost = cache / "fashion_mnist_10k" / "val" / "Bag" / "00007.png"
    lost.rename(tmp_path / "away.png")
    with pytest.raises(DataError, match=r"val holds 1999 images, expected 2000: delete .*fashion_mnist_10k"):
        embedded.fashion_mnist()
    (tmp_path / "away.png").rename(lost)


def test_a_cache_that_cannot_be_written_says_which_variable_to_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FASTJEPA_CACHE", str(tmp_path / "file" / "cache"))  # root too cannot create this
    with pytest.raises(DataError, match=r"file/cache \(Not a directory\): set FASTJEPA_CACHE"):
        embedded.fashion_mnist()


def test_an_interrupted_unpacking_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTJEPA_CACHE", str(tmp_path))

    def disk_full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", disk_full)
    with pytest.raises(DataError, match=r"No space left on device.*60 MB"):
        embedded.fashion_mnist()
    assert list(tmp_path.iterdir()) == []
