"""What `fastjepa.data.check` finds in the images of a data set, one by one (Inspector) and together (Tally)."""

from __future__ import annotations

import dataclasses
import hashlib
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
from PIL import Image

from fastjepa.config import DataConfig
from fastjepa.data.dataset import ImageDataset, Ints
from fastjepa.data.decode.cpu import TurboDecoder
from fastjepa.data.decode.images import READ_ERRORS, BadImage, BadImages, EncodedImage
from fastjepa.data.reader import read_image
from fastjepa.data.threads import for_each

_PER_THREAD = 64  # images that each thread looks at before all are counted

_COLOURS = {
    "1": "black and white",
    "L": "grey",
    "LA": "grey with alpha",
    "P": "palette",
    "PA": "palette with alpha",
    "RGBA": "RGB with alpha",
}
_ORIENTATION = 0x0112  # of EXIF: 1 is upright, 2 to 8 are turned or mirrored
_BITS_PER_SAMPLE = 258  # of TIFF


class Found(NamedTuple):
    """A usable image."""

    height: int
    width: int
    num_bytes: int
    digest: bytes
    """16 bytes: BLAKE2b of the encoded image."""
    kind: str
    """Format and colour mode, as `JPEG RGB`."""
    animated: bool
    rotated: bool
    """EXIF asks for it to be turned or mirrored, which no decoder does."""
    damage: str | None
    """What is wrong with its data, though training would use what could be decoded."""


class Inspector:
    """Looks at an image as training would, on any thread."""

    def __init__(self, config: DataConfig, *, headers_only: bool) -> None:
        self._config, self._headers_only = config, headers_only
        # All of the image is decoded, and one pixel of it is kept.
        one_pixel = dataclasses.replace(config, image_size=1, dct_scaling=False, num_threads=1)
        self._decoder = TurboDecoder(one_pixel, _SameThread())

    def __call__(self, dataset: ImageDataset, index: int) -> Found:
        """
        Raises:
            BadImage: training would take another image instead.
        """
        try:
            image = read_image(dataset, index, self._config)
            kind, rotated = _kind(image), _is_rotated(image)
            damage = None if self._headers_only else self._decode(image)
        except BadImage:
            raise
        except Exception as error:
            error.add_note(f"while looking at {dataset.name(index)}, which would end a run in the same way")
            raise
        digest = hashlib.blake2b(image.data, digest_size=16).digest()
        return Found(image.height, image.width, len(image.data), digest, kind, image.animated, rotated, damage)

    def _decode(self, image: EncodedImage) -> str | None:
        """What is wrong with an image that is usable all the same."""
        damage = None
        if image.plain_jpeg:
            try:
                simplejpeg.decode_jpeg(image.data, "RGB", strict=True)
                return None
            except ValueError as error:
                damage = str(error)
        try:
            self._decoder.decode([image], np.array([[0, 0, 1, 1]], np.int32), np.zeros(1, bool))
        except BadImages as error:
            raise BadImage(error.bad[0]) from error
        return damage


class _SameThread(Executor):
    """Works on the thread that asks, which is one of a pool already."""

    def map(self, fn: Callable[..., Any], *iterables: Iterable[Any], **_: Any) -> Iterator[Any]:
        return map(fn, *iterables)


def _kind(image: EncodedImage) -> str:
    if image.plain_jpeg:
        colour = simplejpeg.decode_jpeg_header(image.data, strict=False)[2]
        return f"{image.format} {'grey' if colour == 'Gray' else 'RGB'}"
    opened = image.open()
    mode = opened.mode
    if mode.startswith("I"):
        return f"{image.format} 16-bit grey"
    # Pillow's other modes do not tell 16 bits from 8.
    is_16 = image.format == "PNG" and image.data[24] == 16
    is_16 |= image.format == "TIFF" and 16 in getattr(opened, "tag_v2", {}).get(_BITS_PER_SAMPLE, ())
    return f"{image.format} {'16-bit ' if is_16 else ''}{_COLOURS.get(mode, mode)}"


def _is_rotated(image: EncodedImage) -> bool:
    if image.plain_jpeg:
        start = image.data.find(b"Exif\0\0", 0, 1 << 17)
        exif = image.data[start : start + 0xFFFF] if image.data[max(start - 4, 0) : start - 2] == b"\xff\xe1" else b""
    else:
        exif = image.open().info.get("exif", b"")  # TIFF files have none here: Pillow turns them when it decodes
    try:
        tags = Image.Exif()
        tags.load(exif)
        return tags.get(_ORIENTATION) in range(2, 9)
    except READ_ERRORS:
        return False


class Tally:
    """What was found in one split: a few bytes an image, however many there are, and the bad ones by name."""

    def __init__(self, dataset: ImageDataset) -> None:
        self.dataset = dataset
        self.sizes = np.zeros((len(dataset), 2), np.int32)
        """[n, 2]: height and width; 0: bad, or not seen."""
        self.digests = np.zeros((len(dataset), 2), np.uint64)
        """[n, 2]: `Found.digest`."""
        self.kinds: Counter[str] = Counter()
        self.animated = self.rotated = self.num_bytes = 0
        self.largest_file = (0, 0)
        """Bytes, index."""
        self.bad: dict[int, str] = {}
        """Index -> reason."""
        self.damaged: dict[int, str] = {}

    @property
    def usable(self) -> Ints:
        """Indices, int64, ascending."""
        return np.flatnonzero(self.sizes[:, 0])

    @property
    def seen(self) -> int:
        return sum(self.kinds.values()) + len(self.bad)

    def scan(
        self,
        inspect: Inspector,
        pool: Executor,
        num_threads: int,
        stop: threading.Event,
        progress: Callable[[int], None],
    ) -> None:
        """Look at all images, or at as many as can be until `stop` is set.

        Args:
            inspect: looks at one.
            pool: of num_threads threads.
            num_threads: how many share the work.
            stop: ends the work early.
            progress: is told now and then how many more images have been counted.
        """
        chunk = _PER_THREAD * num_threads
        for start in range(0, len(self.dataset), chunk):
            before = self.seen
            self._scan(range(start, min(start + chunk, len(self.dataset))), inspect, pool, num_threads, stop)
            progress(self.seen - before)
            if stop.is_set():
                return

    def _scan(
        self, indices: range, inspect: Inspector, pool: Executor, num_threads: int, stop: threading.Event
    ) -> None:
        found: list[Found | None] = [None] * len(indices)

        def look(position: int) -> None:
            if not stop.is_set():
                found[position] = inspect(self.dataset, indices[position])

        bad = for_each(look, len(indices), pool, num_threads)
        self.bad |= {indices[position]: reason for position, reason in bad.items()}
        for index, image in zip(indices, found, strict=True):
            if image is not None:
                self._add(index, image)

    def _add(self, index: int, image: Found) -> None:
        self.sizes[index] = image.height, image.width
        self.digests[index] = np.frombuffer(image.digest, np.uint64)
        self.kinds[image.kind] += 1
        self.animated += image.animated
        self.rotated += image.rotated
        self.num_bytes += image.num_bytes
        self.largest_file = max(self.largest_file, (image.num_bytes, index))
        if image.damage is not None:
            self.damaged[index] = image.damage


class SameBytes(NamedTuple):
    """Which of n images have the same bytes."""

    order: Ints
    """int64 [n]: all positions, those of the same bytes side by side and ascending."""
    starts: Ints
    """int64 [g]: where the groups of two or more start in `order`; the groups are sorted by their first position."""
    ends: Ints
    """int64 [g]: where they end."""


def same_bytes(digests: np.ndarray[Any, np.dtype[np.uint64]]) -> SameBytes:
    """By the digests of images, uint64 [n, 2]."""
    order = np.lexsort(digests.T)  # stable
    digests = digests[order]
    edges = np.flatnonzero(np.concatenate([[True], (digests[1:] != digests[:-1]).any(1), [True]]))
    groups = np.flatnonzero(np.diff(edges) > 1)
    groups = groups[np.argsort(order[edges[groups]])]
    return SameBytes(order, edges[groups], edges[groups + 1])
