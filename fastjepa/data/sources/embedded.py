"""The data set inside the package: 8,000 + 2,000 images of Fashion-MNIST (28 x 28, grey; Zalando SE, MIT licence).

It is unpacked once into the cache folder, as class folders of PNG files. So the default run reads its images in the same way
as those of any user.
"""

from __future__ import annotations

import lzma
import tempfile
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import numpy as np
from PIL import Image

from fastjepa.data.sources.cache import cache_folder
from fastjepa.errors import DataError

_NAME = "fashion_mnist_10k"
_CLASSES = ("T-shirt-top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle-boot")
_COUNTS = {"train": 8000, "val": 2000}
_SIZE = 28


def fashion_mnist() -> Path:
    """The folder of the embedded set, `{train,val}/<class>/<number>.png`. The set is unpacked if the folder does not exist.

    Processes that unpack at the same time each use a folder of their own; the first to finish renames it.

    Raises:
        DataError: the cache folder cannot be written, or images are missing from it.
    """
    cache = cache_folder()
    folder = cache / _NAME
    if not folder.exists():
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache, prefix=f".{_NAME}-") as temporary:
                complete = Path(temporary) / _NAME
                _unpack(complete)
                if not folder.exists():
                    complete.rename(folder)
        except OSError as error:
            if not folder.exists():  # otherwise another process was faster
                raise DataError(
                    f"cannot unpack the embedded images into {cache} ({error.strerror}): "
                    f"set FASTJEPA_CACHE to a writable folder with 60 MB of space"
                ) from error
    for split, expected in _COUNTS.items():
        count = sum(1 for _ in folder.glob(f"{split}/*/*.png"))
        if count != expected:
            raise DataError(
                f"{folder}/{split} holds {count} images, expected {expected}: delete {folder} to unpack it anew"
            )
    return folder


def _unpack(folder: Path) -> None:
    numbers = {(split, label): 0 for split in _COUNTS for label in range(len(_CLASSES))}
    for split in _COUNTS:
        for name in _CLASSES:
            (folder / split / name).mkdir(parents=True)
    for split, label, pixels in _read():
        number = numbers[split, label]
        numbers[split, label] += 1
        Image.fromarray(pixels).save(folder / split / _CLASSES[label] / f"{number:05d}.png", compress_level=1)


def _read() -> Iterator[tuple[str, int, np.ndarray[tuple[int, ...], np.dtype[np.uint8]]]]:
    """Split, label and pixels, uint8 [28, 28], of every image.

    The packed file (xz): `FM10`, uint32 n_train, uint32 n_test (little endian), labels uint8 (train, then test), images
    uint8 [n, 28, 28] in the same order.
    """
    data = lzma.decompress(resources.files("fastjepa.data").joinpath(f"embedded/{_NAME}.bin.xz").read_bytes())
    n_train, n_test = (int(n) for n in np.frombuffer(data, "<u4", 2, offset=4))
    n = n_train + n_test
    labels = np.frombuffer(data, np.uint8, n, offset=12)
    images = np.frombuffer(data, np.uint8, n * _SIZE**2, offset=12 + n).reshape(n, _SIZE, _SIZE)
    for index in range(n):
        yield ("train" if index < n_train else "val"), int(labels[index]), images[index]
