"""Tar shards: which samples, where they lie, and what is done about broken ones."""

import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from fastjepa.data.dataset import ImageDataset
from fastjepa.data.sources.index import Listing
from fastjepa.data.sources.webdataset import list_shards
from fastjepa.errors import DataError

Members = dict[str, bytes] | list[tuple[str, bytes]]


def write_shard(path: Path, members: Members, tar_format: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=tar_format, errors="surrogateescape") as tar:
        for name, content in members.items() if isinstance(members, dict) else members:
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(content), 1.5 if tar_format == tarfile.PAX_FORMAT else 1
            tar.addfile(member, io.BytesIO(content))
    return path


def write_index(shard: Path, version: str = "v1.2") -> Path:
    """As DALI's wds2idx does, one member a line."""
    with tarfile.open(shard) as tar:
        rows = [(m.name.partition(".")[2], m.offset_data, m.size, m.name) for m in tar if m.isreg()]
    lines = [" ".join(map(str, row if version == "v1.2" else row[:3])) for row in rows]
    index = shard.with_suffix(".idx")
    index.write_text("\n".join([f"{version} {len(lines)}", *lines]) + "\n", encoding="utf-8")
    return index


def listed(*shards: Path) -> Listing:
    return list_shards([str(shard) for shard in shards])


def content(dataset: ImageDataset) -> dict[str, bytes]:
    return {dataset.name(i): dataset.read(i, 1 << 20) for i in range(len(dataset))}


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


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_and_names_that_are_not_utf8_are_whole(tmp_path: Path, tar_format: int) -> None:
    names = [
        "a" * 101 + ".jpg",
        "d" * 90 + "/" + "b" * 60 + ".jpg",
        "ä 雪.jpg",
        os.fsdecode(b"\xff\xfe.jpg"),
        "last.jpg",
    ]
    shard = write_shard(tmp_path / "a.tar", {name: os.fsencode(name) for name in names}, tar_format)
    dataset = listed(shard).dataset
    assert list(dataset.names) == [b"a.tar/" + os.fsencode(name) for name in names]
    assert [dataset.read(i, 999) for i in range(len(names))] == [os.fsencode(name) for name in names]


def test_ustar_prefixes_belong_to_the_name(tmp_path: Path) -> None:
    name = "d" * 90 + "/" + "b" * 60 + ".jpg"
    dataset = listed(write_shard(tmp_path / "a.tar", {name: b"x"}, tarfile.USTAR_FORMAT)).dataset
    assert dataset.name(0) == f"a.tar/{name}"


def test_sizes_beyond_octal_digits_are_read(tmp_path: Path) -> None:
    """GNU: 9 GB in base 256. Only the header is there, so the member is cut short, which takes the size to know."""
    member = tarfile.TarInfo("1.jpg")
    member.size = 9 << 30
    whole = tarfile.TarInfo("0.jpg").tobuf()
    (tmp_path / "a.tar").write_bytes(whole + member.tobuf(tarfile.GNU_FORMAT) + b"x" * 600)
    with open(tmp_path / "a.tar", "r+b") as file:  # noqa: PTH123
        file.truncate(10 << 30)  # sparse on disk
    dataset = listed(tmp_path / "a.tar").dataset
    assert dataset.spans is not None
    assert dataset.spans.size.tolist() == [0, 9 << 30]


def test_links_folders_and_sparse_members_are_no_images(tmp_path: Path) -> None:
    def add(tar: tarfile.TarFile, name: str, **attributes: object) -> None:
        member = tarfile.TarInfo(name)
        for key, value in attributes.items():
            setattr(member, key, value)
        tar.addfile(member, io.BytesIO(b"x" * member.size))

    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        add(tar, "d.jpg", type=tarfile.DIRTYPE)
        add(tar, "s.jpg", type=tarfile.SYMTYPE, linkname="1.jpg")
        add(tar, "h.jpg", type=tarfile.LNKTYPE, linkname="1.jpg")
        add(tar, "p.jpg", size=700, pax_headers={"GNU.sparse.map": "0,700", "GNU.sparse.size": "900"})
        add(tar, "o.jpg", size=700, type=tarfile.GNUTYPE_SPARSE)
        add(tar, "1.jpg", size=3)
    assert content(listed(tmp_path / "a.tar").dataset) == {"a.tar/1.jpg": b"xxx"}


IMAGES = {f"{i}.jpg": bytes([65 + i]) * 700 for i in range(4)}


@pytest.fixture
def four(tmp_path: Path) -> Path:
    """A shard of four images, of 512 + 1024 bytes each."""
    return write_shard(tmp_path / "broken.tar", IMAGES, tarfile.GNU_FORMAT)


def test_headers_that_lead_nowhere_end_the_shard(tmp_path: Path) -> None:
    """A negative size sends tarfile back to the same header, for ever; a NUL ends names elsewhere."""
    for name, header in {
        "negative": tarfile.TarInfo("2.jpg"),
        "nul": tarfile.TarInfo("2\0.jpg"),
    }.items():
        with tarfile.open(tmp_path / f"{name}.tar", "w", format=tarfile.PAX_FORMAT) as tar:
            first = tarfile.TarInfo("1.jpg")
            first.size = 3
            tar.addfile(first, io.BytesIO(b"one"))
            if name == "nul":
                header.pax_headers = {"path": "2\0.jpg"}
            tar.addfile(header)
        if name == "negative":
            data = bytearray((tmp_path / "negative.tar").read_bytes())
            block = data[1024:1536]
            block[124:136] = b"\xff" * 4 + (-512).to_bytes(8, signed=True)
            block[148:156] = b" " * 8
            block[148:156] = b"%06o\0 " % sum(block)
            (tmp_path / "negative.tar").write_bytes(data[:1024] + block + data[1536:])
        listing = listed(tmp_path / f"{name}.tar")
        assert content(listing.dataset) == {f"{name}.tar/1.jpg": b"one"}
        assert "is damaged" in listing.warnings[0]


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
def test_of_a_broken_shard_the_samples_before_are_used(
    tmp_path: Path, four: Path, damage: Callable[[bytes], bytes], left: int, reason: str
) -> None:
    four.write_bytes(damage(four.read_bytes()))
    listing = listed(four, write_shard(tmp_path / "good.tar", {"9.jpg": b"good"}))
    expected = {f"broken.tar/{i}.jpg": IMAGES[f"{i}.jpg"] for i in range(left)}
    assert content(listing.dataset) == {**expected, "good.tar/9.jpg": b"good"}
    assert len(listing.warnings) == 1
    assert listing.warnings[0].startswith(f"{four}: {reason}")
    assert listing.warnings[0].endswith(f"; {left} samples found before are used")


def test_a_label_that_was_cut_off_takes_its_sample_with_it_only(tmp_path: Path) -> None:
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
def test_what_is_no_tar_is_left_out(tmp_path: Path, four: Path, data: bytes, reason: str) -> None:
    (tmp_path / "bad.tar").write_bytes(data)
    listing = listed(tmp_path / "bad.tar", four)
    assert len(listing.dataset) == 4
    assert len(listing.warnings) == 1
    with pytest.raises(DataError, match=rf"no images in the shards.*bad\.tar: {reason}"):
        listed(tmp_path / "bad.tar")


def test_missing_shards_are_named_and_the_others_used(tmp_path: Path, four: Path) -> None:
    missing = [tmp_path / f"missing-{i}.tar" for i in range(7)]
    listing = listed(*missing, four)
    assert len(listing.dataset) == 4
    assert listing.warnings == [f"7 of 8 shards are missing: {', '.join(map(str, missing[:5]))}, ..."]
    assert os.fsencode(missing[6]) in listing.watched
    with pytest.raises(DataError, match=r"no images in the shards.*1 of 1 shards are missing: .*missing-0\.tar"):
        listed(missing[0])


def test_a_folder_named_like_a_shard_is_left_out(tmp_path: Path, four: Path) -> None:
    (tmp_path / "folder.tar").mkdir()
    listing = listed(tmp_path / "folder.tar", four)
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
    # It is the index that was read: a sample that it leaves out is not there.
    lines = index.read_text().splitlines()
    index.write_text("\n".join(["v1.2 2", *lines[1:3]]))
    assert content(listed(shard).dataset) == {"a.tar/1.jpg": b"one"}


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text.replace("v1.2 4", "v1.2 5"),
        lambda text: text.replace("v1.2", "v1.3"),
        lambda text: text.replace("jpg 512 ", "jpg 1024 "),
        lambda text: text.replace("1.jpg", "1 .jpg"),
        lambda text: text.replace("1.jpg", r"\303\204.jpg"),
        lambda text: text.replace("0.jpg", "0" * 100 + ".jpg"),
        lambda text: text.replace("700", "x"),
        lambda text: text[:-10],
        lambda text: "",
        lambda text: "\0\xff",
    ],
)
def test_an_index_that_does_not_fit_is_not_used(four: Path, spoil: Callable[[str], str]) -> None:
    index = write_index(four)
    text = index.read_text()
    assert spoil(text) != text
    index.write_text(spoil(text))
    listing = listed(four)
    assert content(listing.dataset) == {f"broken.tar/{name}": data for name, data in IMAGES.items()}
    assert listing.warnings == []


def test_an_index_without_names_or_older_than_its_shard_is_not_used(four: Path) -> None:
    """Samples are known by their names."""
    write_index(four, "v1.1")
    assert len(listed(four).dataset) == 4
    index = write_index(four)
    index.write_text("\n".join(["v1.2 1", index.read_text().splitlines()[1]]))
    assert len(listed(four).dataset) == 1
    os.utime(index, ns=(0, four.stat().st_mtime_ns - 1))
    assert len(listed(four).dataset) == 4
