"""Tar shards as a source: their samples and labels, and what is used of broken shards."""

import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from fastjepa.errors import DataError
from tests.support.shards import IMAGES, content, listed, write_index, write_shard


def test_members_with_one_key_are_a_sample_of_their_first_image(tmp_path: Path) -> None:
    shard = write_shard(
        tmp_path / "s-000.tar",
        {
            "d.x/1.json": b"{}",
            "d.x/1.seg.PNG": b"one",
            "d.x/1.jpg": b"not the first",
            "d.x/README": b"no key",
            "d.x/1.webp": b"still the same sample",
            "2.cls": b"7",
            "2.jpg": b"",
            "._3.jpg": b"hidden",
            "a/._3.jpg": b"hidden",
            "3.txt": b"no image",
            "1.jpg": b"1" * 513,
        },
    )
    listing = listed(shard)
    assert list(listing.dataset.names) == [b"s-000.tar/d.x/1.seg.PNG", b"s-000.tar/2.jpg", b"s-000.tar/1.jpg"]
    assert listing.dataset.read(0, 99) == b"one"
    assert listing.dataset.read(2, 1000) == b"1" * 513
    assert listing.dataset.labels is None
    assert listing.warnings == [
        f"{tmp_path}: passed over 1 samples without an image",
        f"{tmp_path}: 2 of 3 samples have no label: no labels are used",
    ]


def test_the_order_is_that_of_the_shards_and_their_members(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    b = write_shard(tmp_path / "deep" / "b.tar", {"2.jpg": b"b2", "1.jpg": b"b1"})
    a = write_shard(tmp_path / "a.tar", {"1.jpg": b"a1"})
    listing = listed(b, a)
    assert content(listing.dataset) == {"deep/b.tar/2.jpg": b"b2", "deep/b.tar/1.jpg": b"b1", "a.tar/1.jpg": b"a1"}
    assert list(listing.dataset.names) == [b"deep/b.tar/2.jpg", b"deep/b.tar/1.jpg", b"a.tar/1.jpg"]
    assert listing.dataset.root == str(tmp_path)
    assert listing.watched == [os.fsencode(p.with_suffix(s)) for p in (b, a) for s in (".tar", ".idx")]


def test_cls_members_are_labels_across_shards(tmp_path: Path) -> None:
    a = write_shard(tmp_path / "a.tar", {"1.cls": b"10\n", "1.jpg": b"x", "2.jpg": b"x", "2.cls": b"9"})
    b = write_shard(tmp_path / "b.tar", {"1.jpg": b"x", "1.cls": b"10", "2.jpg": b"x", "2.cls": b"0"})
    dataset = listed(a, b).dataset
    assert dataset.class_names == ("0", "9", "10")
    assert dataset.labels is not None
    assert dataset.labels.tolist() == [2, 1, 2, 0]


def test_cls_members_may_be_texts(tmp_path: Path) -> None:
    shard = write_shard(
        tmp_path / "a.tar", {"1.cls": "schöner Hund".encode(), "1.jpg": b"x", "2.jpg": b"x", "2.CLS": b"9"}
    )
    dataset = listed(shard).dataset
    assert dataset.class_names == ("9", "schöner Hund")
    assert dataset.labels is not None
    assert dataset.labels.tolist() == [1, 0]


def test_a_name_that_occurs_again_is_numbered(tmp_path: Path) -> None:
    members = [
        ("1.jpg", b"a"),
        ("2.jpg", b"b"),
        ("1.jpg", b"c"),
        ("1.jpg#2", b"no image"),
        ("2.jpg", b"d"),
        ("1.jpg", b"e"),
    ]
    dataset = listed(write_shard(tmp_path / "a.tar", members)).dataset
    expected = {"1.jpg": b"a", "2.jpg": b"b", "1.jpg#2": b"c", "2.jpg#2": b"d", "1.jpg#3": b"e"}
    assert content(dataset) == {f"a.tar/{name}": data for name, data in expected.items()}


@pytest.mark.parametrize(
    ("damage", "left", "reason"),
    [
        (lambda data: data[: 1536 * 2 + 600], 2, "it ends after 3672 bytes, within 2.jpg"),
        (lambda data: data[: 1536 * 2 + 100], 2, "it ends after 3172 bytes without an end mark"),
        (lambda data: data[: 1536 * 2], 2, "it ends after 3072 bytes without an end mark"),
        (lambda data: data[: 1536 * 2 + 512 + 700], 3, "unexpected end of data (it has 4284 bytes)"),
        (lambda data: data[:3072] + b"?" + data[3073:], 2, "the header at byte 3072 is damaged"),
        (lambda data: data[: 3072 + 124] + b"zz" + data[3072 + 126 :], 2, "the header at byte 3072 is damaged"),
    ],
)
def test_samples_before_the_damage_in_a_shard_are_used(
    tmp_path: Path, shard_of_four: Path, damage: Callable[[bytes], bytes], left: int, reason: str
) -> None:
    shard_of_four.write_bytes(damage(shard_of_four.read_bytes()))
    listing = listed(shard_of_four, write_shard(tmp_path / "good.tar", {"9.jpg": b"good"}))
    expected = {f"broken.tar/{i}.jpg": IMAGES[f"{i}.jpg"] for i in range(left)}
    assert content(listing.dataset) == {**expected, "good.tar/9.jpg": b"good"}
    assert len(listing.warnings) == 1
    assert listing.warnings[0].startswith(f"{shard_of_four}: {reason}")
    assert listing.warnings[0].endswith(f"; {left} samples found before are used")


def test_only_the_sample_whose_label_was_cut_off_is_lost(tmp_path: Path) -> None:
    members = {"1.jpg": b"x", "1.cls": b"1", "2.jpg": b"y", "2.cls": b"2"}
    shard = write_shard(tmp_path / "a.tar", members, tarfile.GNU_FORMAT)
    shard.write_bytes(shard.read_bytes()[: 1024 * 3 + 512])
    listing = listed(shard)
    assert content(listing.dataset) == {"a.tar/1.jpg": b"x"}
    assert listing.dataset.class_names == ("1",)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", r"empty file \(it has 0 bytes\)"),
        (b"\x1f\x8b\x08" + bytes(600), r"it is no tar archive \(compressed ones cannot be used\)"),
        (b"short", "it is no tar archive"),
    ],
)
def test_a_file_that_is_no_tar_archive_is_left_out(
    tmp_path: Path, shard_of_four: Path, data: bytes, reason: str
) -> None:
    (tmp_path / "bad.tar").write_bytes(data)
    listing = listed(tmp_path / "bad.tar", shard_of_four)
    assert len(listing.dataset) == 4
    assert len(listing.warnings) == 1
    with pytest.raises(DataError, match=rf"no images in the shards.*bad\.tar: {reason}"):
        listed(tmp_path / "bad.tar")


def test_missing_shards_are_named_and_the_others_used(tmp_path: Path, shard_of_four: Path) -> None:
    missing = [tmp_path / f"missing-{i}.tar" for i in range(7)]
    listing = listed(*missing, shard_of_four)
    assert len(listing.dataset) == 4
    assert listing.warnings == [f"7 of 8 shards are missing: {', '.join(map(str, missing[:5]))}, ..."]
    assert os.fsencode(missing[6]) in listing.watched
    with pytest.raises(DataError, match=r"no images in the shards.*1 of 1 shards are missing: .*missing-0\.tar"):
        listed(missing[0])


def test_a_folder_named_like_a_shard_is_left_out(tmp_path: Path, shard_of_four: Path) -> None:
    (tmp_path / "folder.tar").mkdir()
    listing = listed(tmp_path / "folder.tar", shard_of_four)
    assert len(listing.dataset) == 4
    assert "folder.tar: Is a directory" in listing.warnings[0]


def test_shards_without_images_are_refused(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a.tar", {"1.txt": b"x", "2.txt": b"x"})
    with pytest.raises(DataError, match=r"no images in the shards; looked for members with .*\.jpg.*2 samples without"):
        listed(shard)


def test_an_index_of_dali_takes_the_place_of_the_headers(tmp_path: Path) -> None:
    members = {"1.cls": b"3", "1.jpg": b"one", "a/._x.jpg": b"hidden", "a/2.jpg": b"two" * 300, "a/2.cls": b"1"}
    shard = write_shard(tmp_path / "a.tar", members)
    without = listed(shard).dataset
    index = write_index(shard)
    with_index = listed(shard).dataset
    assert with_index.fingerprint == without.fingerprint
    assert content(with_index) == content(without) == {"a.tar/1.jpg": b"one", "a.tar/a/2.jpg": b"two" * 300}
    assert with_index.class_names == without.class_names == ("1", "3")
    # A sample that the index leaves out is not there: so the index was read, and not the headers.
    lines = index.read_text().splitlines()
    index.write_text("\n".join(["v1.2 2", *lines[1:3]]))
    assert content(listed(shard).dataset) == {"a.tar/1.jpg": b"one"}


def test_an_index_without_names_or_older_than_its_shard_is_not_used(shard_of_four: Path) -> None:
    """Samples are known by their names, so an index without names is of no use."""
    write_index(shard_of_four, "v1.1")
    assert len(listed(shard_of_four).dataset) == 4
    index = write_index(shard_of_four)
    index.write_text("\n".join(["v1.2 1", index.read_text().splitlines()[1]]))
    assert len(listed(shard_of_four).dataset) == 1
    os.utime(index, ns=(0, shard_of_four.stat().st_mtime_ns - 1))
    assert len(listed(shard_of_four).dataset) == 4
