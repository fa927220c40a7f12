"""The reader: images with their own crops, another one in the place of each bad one, and the seconds that it took."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from torch import Tensor

import fastjepa.data.reader as reader_module
from fastjepa.config import Config, DataConfig
from fastjepa.data.bad_samples import BadSamples
from fastjepa.data.dataset import ImageDataset, Strings
from fastjepa.data.decode.images import EncodedImage
from fastjepa.data.image_errors import BadImage, BadImages
from fastjepa.data.order import crop_boxes, flips, replacement
from fastjepa.data.reader import Images, Reader, ViewDecoder, fetch, read_image, sizes_of
from fastjepa.errors import DataError

SEED, EPOCH, NUM_IMAGES = (
    3,
    10,
    40,
)  # the replacements of images 7 and 22 are mirrored where these are not, or the reverse


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images `0.png` to `39.png`. Image i is i + 20 pixels high and 30 wide, and all its pixels are i."""
    for i in range(NUM_IMAGES):
        Image.new("L", (30, i + 20), i).save(tmp_path / f"{i}.png")
    return tmp_path


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


def dataset_of(folder: Path) -> ImageDataset:
    return ImageDataset(str(folder), Strings.of(f"{i}.png".encode() for i in range(NUM_IMAGES)), None, ())


class Decoder:
    """Gives every pixel the value of the image. It calls images bad by their value, and keeps what it was asked for."""

    def __init__(self, bad: Sequence[int] = (), seconds: float = 0.0) -> None:
        self._bad, self._seconds = bad, seconds
        self.batches: list[list[int]] = []

    def decode(
        self, images: Sequence[EncodedImage], boxes: npt.NDArray[np.int32], flips: npt.NDArray[np.bool_]
    ) -> Tensor:
        time.sleep(self._seconds)
        values = [image.height - 20 for image in images]
        self.batches.append(values)
        if bad := {position: f"reason {value}" for position, value in enumerate(values) if value in self._bad}:
            raise BadImages(bad)
        assert len(boxes) == len(flips) == len(images)
        return torch.tensor(values, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 4, 4)


@pytest.fixture
def make_reader(
    folder: Path, pool: ThreadPoolExecutor, make_config: Callable[..., Config]
) -> Callable[..., tuple[Reader, BadSamples]]:
    def make(decoder: Decoder, max_share: float = 1.0) -> tuple[Reader, BadSamples]:
        dataset = dataset_of(folder)
        bad = BadSamples(dataset, max_share, None)
        view = ViewDecoder(make_config(flip=0.5).data, decoder)
        return Reader(dataset, [view], SEED, pool, bad), bad

    return make


MakeReader = Callable[..., tuple[Reader, BadSamples]]


def stand_in(index: int, bad: set[int]) -> int:
    """The image that belongs in the place of `index`, by the documented rule."""
    attempts = (replacement(index, k, seed=SEED, epoch=EPOCH, num_images=NUM_IMAGES) for k in itertools.count(1))
    return next(candidate for candidate in itertools.chain([index], attempts) if candidate not in bad)


def check(images: Images, config: DataConfig, expected: list[int]) -> None:
    """Check that these are the images at the expected indices, each with the crop and the flip of its own index and size."""
    indices = np.array(expected)
    sizes = np.array([(i + 20, 30) for i in expected], np.int32)
    assert images.sample_ids.tolist() == expected
    assert images.pixels[0][:, 0, 0, 0].tolist() == expected
    np.testing.assert_array_equal(
        images.boxes[0], crop_boxes(config, seed=SEED, epoch=EPOCH, indices=indices, sizes=sizes)
    )
    np.testing.assert_array_equal(images.flips[0], flips(config, seed=SEED, epoch=EPOCH, indices=indices))


WANTED = np.array([7, 31, 0, 7, 22, 15])


def test_images_come_in_the_order_asked_for_with_their_own_crops_and_flips(
    make_reader: MakeReader, make_config: Callable[..., Config]
) -> None:
    reader, bad = make_reader(Decoder())
    wanted = WANTED.copy()
    check(reader.read(wanted, EPOCH), make_config(flip=0.5).data, WANTED.tolist())
    assert wanted.tolist() == WANTED.tolist()  # the caller's array is left alone
    assert len(bad) == 0


@pytest.mark.parametrize("found_by", ["file", "header", "decoder", "both"])
def test_every_bad_image_of_a_batch_is_replaced_by_the_rule_with_the_crop_of_its_replacement(
    folder: Path, make_reader: MakeReader, make_config: Callable[..., Config], found_by: str
) -> None:
    """Several bad images, one of them asked for twice, and a replacement that is bad itself."""
    first = {7, 22}
    second = {stand_in(22, first)}  # bad, too: its place goes to the next in line
    bad = first | second
    in_place = [stand_in(i, bad) for i in WANTED.tolist()]
    own, theirs = (
        flips(make_config(flip=0.5).data, seed=SEED, epoch=EPOCH, indices=np.array(indices))
        for indices in (WANTED, in_place)
    )
    assert (own != theirs)[[0, 3, 4]].all()  # so the test sees whose flips are taken
    in_files = {"file": bad, "header": bad, "decoder": set(), "both": first}[found_by]
    for i in in_files:
        (folder / f"{i}.png").write_bytes(b"" if found_by == "file" else b"no image")
    decoder = Decoder(sorted(bad - in_files))
    reader, counted = make_reader(decoder)
    check(reader.read(WANTED, EPOCH), make_config(flip=0.5).data, in_place)
    assert len(counted) == 3
    expected = {"file": "empty file", "header": "not an image, or damaged in its header"}
    for i in bad:
        assert counted.reason(i) == (f"reason {i}" if i not in in_files else expected.get(found_by, expected["header"]))


def test_an_image_that_is_known_to_be_bad_is_neither_read_nor_decoded_again(
    make_reader: MakeReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = Decoder([7])
    reader, counted = make_reader(decoder)
    reader.read(WANTED, EPOCH)
    read: list[int] = []

    def note(dataset: ImageDataset, index: int, config: DataConfig) -> EncodedImage:
        read.append(index)
        return read_image(dataset, index, config)

    monkeypatch.setattr(reader_module, "read_image", note)
    decoder.batches.clear()
    again = reader.read(WANTED, EPOCH).sample_ids.tolist()
    assert again == [stand_in(i, {7}) for i in WANTED.tolist()]
    assert decoder.batches == [again]
    assert 7 not in read
    assert sorted(read) == sorted(again)  # each image once
    assert len(counted) == 1


def test_good_images_are_read_once_while_bad_ones_are_replaced(
    folder: Path, make_reader: MakeReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "0.png").write_bytes(b"")
    read: list[int] = []

    def note(dataset: ImageDataset, index: int, config: DataConfig) -> EncodedImage:
        read.append(index)
        return read_image(dataset, index, config)

    monkeypatch.setattr(reader_module, "read_image", note)
    reader, _ = make_reader(Decoder([15]))
    reader.read(WANTED, EPOCH)
    expected = [*WANTED.tolist(), stand_in(0, {0, 15}), stand_in(15, {0, 15})]
    assert sorted(read) == sorted(expected)


def test_too_many_bad_images_are_an_error(folder: Path, make_reader: MakeReader) -> None:
    for i in (7, 31, 0):
        (folder / f"{i}.png").unlink()
    reader, _ = make_reader(Decoder(), 0.05)  # two of forty
    with pytest.raises(DataError, match=r"3 of 40 images are bad, more than data\.max_bad_share = 0\.05"):
        reader.read(WANTED, EPOCH)


def test_seconds_of_all_attempts_are_summed_reading_and_decoding_apart(
    folder: Path, make_reader: MakeReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "0.png").unlink()

    def slow(dataset: ImageDataset, index: int, config: DataConfig) -> EncodedImage:
        if index in (0, 22):
            time.sleep(0.1)
        return read_image(dataset, index, config)

    monkeypatch.setattr(reader_module, "read_image", slow)
    reader, _ = make_reader(Decoder([31], seconds=0.2))
    started = time.perf_counter()
    images = reader.read(np.array([22, 31, 0]), EPOCH)
    whole = time.perf_counter() - started
    # Decoded twice: the first time, image 31 turned out bad. Read at least once for as long as the slow images take.
    assert images.decode_seconds >= 0.4
    assert images.read_seconds >= 0.1
    assert images.read_seconds + images.decode_seconds <= whole


def test_fetch_gives_files_with_headers_and_none_with_a_reason_for_bad_ones(
    folder: Path, pool: ThreadPoolExecutor, make_config: Callable[..., Config]
) -> None:
    (folder / "5.png").unlink()
    (folder / "9.png").write_bytes(b"text " * 50)
    images, bad = fetch(dataset_of(folder), np.array([4, 5, 9, 39]), make_config().data, pool)
    assert bad == {1: "No such file or directory", 2: "not an image, or damaged in its header"}
    assert [image is None for image in images] == [False, True, True, False]
    good = [image for image in images if image is not None]
    assert sizes_of(good).tolist() == [[24, 30], [59, 30]]
    assert sizes_of(good).dtype == np.int32
    assert [image.data for image in good] == [(folder / f"{i}.png").read_bytes() for i in (4, 39)]


def test_read_image_refuses_files_and_images_that_are_too_large(
    folder: Path, make_config: Callable[..., Config]
) -> None:
    config = make_config(max_pixels=30 * 25).data
    assert read_image(dataset_of(folder), 5, config).height == 25  # exactly at the limit
    with pytest.raises(BadImage, match=r"30 x 26 pixels, expected at most data\.max_pixels = 750"):
        read_image(dataset_of(folder), 6, config)
    # 8 bytes a pixel, and a MiB for header and colour profile.
    content = (folder / "5.png").read_bytes()
    limit = 8 * 750 + 2**20
    (folder / "5.png").write_bytes(content + b"\0" * (limit - len(content)))
    assert read_image(dataset_of(folder), 5, config).height == 25
    (folder / "5.png").write_bytes(content + b"\0" * (limit + 1 - len(content)))
    with pytest.raises(BadImage, match=f"{limit + 1} bytes, expected at most {limit}"):
        read_image(dataset_of(folder), 5, config)
