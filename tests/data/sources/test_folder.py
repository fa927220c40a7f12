"""Folders of images: which files, which labels, which errors."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from fastjepa.data import DataError, ImageDataset, open_dataset


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def train(root: Path) -> ImageDataset:
    dataset = open_dataset(str(root), "train")
    assert dataset is not None
    return dataset


def test_images_are_found_at_any_depth_in_sorted_order(tmp_path: Path) -> None:
    names = ["b/2.JPG", "b/deep/er/1.png", "a/3.jpeg", "b/10.WebP", "a/z/.hidden.png", ".cache/x.png", "a/notes.txt"]
    dataset = train(touch(tmp_path, *names))
    assert dataset.paths == ("a/3.jpeg", "b/10.WebP", "b/2.JPG", "b/deep/er/1.png")
    assert len(dataset) == 4
    assert dataset.path(0) == str(tmp_path / "a" / "3.jpeg")


def test_first_level_folders_give_labels(tmp_path: Path) -> None:
    dataset = train(touch(tmp_path, "dog/1.png", "cat/a/2.png", "cat/3.png"))
    assert dataset.class_names == ("cat", "dog")
    assert dataset.labels is not None
    assert dataset.labels.tolist() == [0, 0, 1]


@pytest.mark.parametrize("names", [("dog/1.png", "cat/2.png", "3.png"), ("all/1.png", "all/2.png"), ("1.png",)])
def test_other_layouts_have_no_labels(tmp_path: Path, names: tuple[str, ...]) -> None:
    dataset = train(touch(tmp_path, *names))
    assert dataset.labels is None
    assert dataset.class_names == ()


def test_train_and_val_folders_are_splits_with_the_same_classes(tmp_path: Path) -> None:
    touch(tmp_path, "train/a/1.png", "train/b/2.png", "train/c/3.png", "val/a/4.png", "val/c/5.png", "6.png")
    assert train(tmp_path).paths == ("a/1.png", "b/2.png", "c/3.png")
    val = open_dataset(str(tmp_path), "val")
    assert val is not None
    assert val.class_names == train(tmp_path).class_names == ("a", "b", "c")
    assert val.labels is not None
    assert val.labels.tolist() == [0, 2]


@pytest.mark.parametrize("name", ["1.png", "train/1.png"])
def test_a_source_without_val_has_none(tmp_path: Path, name: str) -> None:
    assert len(train(touch(tmp_path, name))) == 1
    assert open_dataset(str(tmp_path), "val") is None


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
    assert train(root).paths == ("file.png", "link/2.png", "z/1.png")


def test_names_that_are_not_utf8_survive(tmp_path: Path, write_invalid_name: Callable[[Path, bytes], bytes]) -> None:
    touch(tmp_path, "ähnlich 雪.png", "x.png")
    written = write_invalid_name(tmp_path / "x.png", b"\xff\xfe.png")
    dataset = train(tmp_path)
    assert {os.fsencode(dataset.path(i)) for i in range(2)} == {written, os.fsencode(tmp_path / "ähnlich 雪.png")}
    assert len(dataset.fingerprint) == 64


def test_fingerprint_is_that_of_the_list_of_files(tmp_path: Path) -> None:
    touch(tmp_path / "a", "x/1.png", "x/2.png")
    touch(tmp_path / "b", "x/1.png", "x/2.png")
    touch(tmp_path / "c", "x/1.png", "x/3.png")
    assert train(tmp_path / "a").fingerprint == train(tmp_path / "b").fingerprint != train(tmp_path / "c").fingerprint


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.source = .*nowhere: No such file or directory; expected a folder"):
        open_dataset(str(tmp_path / "nowhere"), "train")


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"one\.png: Not a folder"):
        open_dataset(str(touch(tmp_path, "one.png") / "one.png"), "train")


@pytest.mark.parametrize(("names", "others"), [((), 0), (("a.txt", "b/c.gif"), 2)])
def test_a_folder_without_images_says_what_was_looked_for(tmp_path: Path, names: tuple[str, ...], others: int) -> None:
    with pytest.raises(DataError, match=rf"no images in .*\({others} other files\).*\.jpeg .*\.png"):
        open_dataset(str(touch(tmp_path, *names)), "train")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads every folder")
def test_an_unreadable_folder_is_named(tmp_path: Path) -> None:
    touch(tmp_path, "open/1.png", "closed/2.png")
    (tmp_path / "closed").chmod(0)
    with pytest.raises(DataError, match=r"closed: cannot be read \(Permission denied\)"):
        open_dataset(str(tmp_path), "train")
