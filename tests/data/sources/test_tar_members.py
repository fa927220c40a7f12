"""Members of a tar file: their names and places, from headers or an index file, and damage that ends them."""

import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.shards import IMAGES, content, listed, write_index, write_shard


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
    """GNU tar writes 9 GB in base 256. The content is a hole of a sparse file, so the test needs no space."""
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


def test_headers_that_lead_nowhere_end_the_shard(tmp_path: Path) -> None:
    """A negative size sends tarfile back to the same header for ever. A NUL in a name ends the name for other programs."""
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
def test_an_index_that_does_not_fit_is_not_used(shard_of_four: Path, spoil: Callable[[str], str]) -> None:
    index = write_index(shard_of_four)
    text = index.read_text()
    assert spoil(text) != text
    index.write_text(spoil(text))
    listing = listed(shard_of_four)
    assert content(listing.dataset) == {f"broken.tar/{name}": data for name, data in IMAGES.items()}
    assert listing.warnings == []
