"""Folders of images: the files that count, their labels, and errors."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from fastjepa.data.dataset import ImageDataset
from fastjepa.data.image_errors import BadImage
from fastjepa.data.sources.folder import list_folder
from fastjepa.errors import DataError


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def listed(root: Path) -> ImageDataset:
    return list_folder([str(root)]).dataset


def names(dataset: ImageDataset) -> list[str]:
    return [dataset.name(i) for i in range(len(dataset))]


def test_images_are_found_at_any_depth_in_sorted_order(tmp_path: Path) -> None:
    images = ["b/2.JPG", "b/deep/er/1.png", "a/3.jpeg", "b/10.WebP", "b.png", "b-/4.png", "b/deep.png", "b/deeq.png"]
    touch(tmp_path, *images, "a/z/.hidden.png", ".cache/x.png", "a/notes.txt")
    dataset = listed(tmp_path)
    assert names(dataset) == sorted(images)
    assert list(dataset.names) == [name.encode() for name in sorted(images)]


def test_images_are_read_from_their_files(tmp_path: Path) -> None:
    touch(tmp_path, "a/empty.png")
    (tmp_path / "a" / "full.png").write_bytes(b"12345")
    dataset = listed(tmp_path)
    assert dataset.read(1, 5) == b"12345"
    with pytest.raises(BadImage, match="5 bytes, expected at most 4"):
        dataset.read(1, 4)
    with pytest.raises(BadImage, match="empty file"):
        dataset.read(0, 5)
    (tmp_path / "a" / "full.png").unlink()
    with pytest.raises(BadImage, match="No such file"):
        dataset.read(1, 5)


def test_first_level_folders_give_labels(tmp_path: Path) -> None:
    dataset = listed(touch(tmp_path, "dog/1.png", "cat/a/2.png", "cat/3.png", "cat.dog/4.png"))
    assert dataset.class_names == ("cat", "cat.dog", "dog")
    assert names(dataset) == ["cat.dog/4.png", "cat/3.png", "cat/a/2.png", "dog/1.png"]
    assert dataset.labels is not None
    assert dataset.labels.tolist() == [1, 0, 0, 2]


@pytest.mark.parametrize("images", [("dog/1.png", "cat/2.png", "3.png"), ("all/1.png", "all/2.png"), ("1.png",)])
def test_other_layouts_have_no_labels(tmp_path: Path, images: tuple[str, ...]) -> None:
    dataset = listed(touch(tmp_path, *images))
    assert dataset.labels is None
    assert dataset.class_names == ()


def test_linked_folders_are_followed_once_and_without_loops(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    touch(root, "z/1.png")
    touch(outside, "2.png")
    (outside / "back").symlink_to(root)
    (root / "z" / "up").symlink_to(root)
    (root / "a_link").symlink_to(root / "z")
    (root / "link").symlink_to(outside)
    (root / "same").symlink_to(outside)
    (root / "file.png").symlink_to(outside / "2.png")
    (root / "broken.png").symlink_to(outside / "missing.png")
    assert names(listed(root)) == ["file.png", "link/2.png", "z/1.png"]


def test_a_folder_of_linked_classes_is_as_one_of_real_ones(tmp_path: Path) -> None:
    images = ["b/1.png", "b-/2.png", "a/x/3.png", "c/4.png"]
    real = listed(touch(tmp_path / "real", *images))
    (tmp_path / "links").mkdir()
    for name in ("c", "b", "b-", "a"):
        (tmp_path / "links" / name).symlink_to(tmp_path / "real" / name)
    linked = listed(tmp_path / "links")
    assert linked.fingerprint == real.fingerprint
    assert linked.class_names == real.class_names
    assert linked.labels is not None
    assert real.labels is not None
    assert linked.labels.tolist() == real.labels.tolist()


def test_names_that_are_not_utf8_survive(tmp_path: Path, write_invalid_name: Callable[[Path, bytes], bytes]) -> None:
    touch(tmp_path, "ähnlich 雪.png", "x.png")
    written = write_invalid_name(tmp_path / "x.png", b"\xff\xfe.png")
    with open(written, "wb") as file:  # noqa: PTH123 (bytes)
        file.write(b"1")
    dataset = listed(tmp_path)
    assert list(dataset.names) == [os.fsencode("ähnlich 雪.png"), b"\xff\xfe.png"]
    assert dataset.name(1) == r"\xff\xfe.png"
    assert dataset.read(1, 1) == b"1"


def test_fingerprint_is_that_of_the_list_of_files(tmp_path: Path) -> None:
    a, b, c = (
        listed(touch(tmp_path / folder, "x/1.png", f"x/{last}.png")) for folder, last in (("a", 2), ("b", 2), ("c", 3))
    )
    assert a.fingerprint == b.fingerprint != c.fingerprint


def test_other_files_are_counted_and_one_is_named(tmp_path: Path) -> None:
    listing = list_folder([str(touch(tmp_path, "1.png", "a/b.txt", "a/c.json"))])
    assert len(listing.warnings) == 1
    assert "passed over 2 other files, such as a/" in listing.warnings[0]


@pytest.mark.parametrize(("files", "others"), [((), "0 other files"), (("b/c.gif.gz",), r"1 .*, such as b/c\.gif\.gz")])
def test_a_folder_without_images_says_what_was_looked_for(tmp_path: Path, files: tuple[str, ...], others: str) -> None:
    with pytest.raises(DataError, match=rf"no images in .*\({others}\).*\.jpeg .*\.png"):
        listed(touch(tmp_path, *files))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads every folder")
def test_an_unreadable_folder_is_named(tmp_path: Path) -> None:
    touch(tmp_path, "open/1.png", "closed/2.png")
    (tmp_path / "closed").chmod(0)
    with pytest.raises(DataError, match=r"closed/?: cannot be read \(Permission denied\)"):
        listed(tmp_path)
