"""Writes tar shards, and index files as DALI does, for tests."""

import io
import tarfile
from pathlib import Path

from fastjepa.data.dataset import ImageDataset
from fastjepa.data.sources.index import Listing
from fastjepa.data.sources.webdataset import list_shards

Members = dict[str, bytes] | list[tuple[str, bytes]]


def write_shard(path: Path, members: Members, tar_format: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=tar_format, errors="surrogateescape") as tar:
        for name, content in members.items() if isinstance(members, dict) else members:
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(content), 1.5 if tar_format == tarfile.PAX_FORMAT else 1
            tar.addfile(member, io.BytesIO(content))
    return path


def write_index(shard: Path, version: str = "v1.2") -> Path:
    """Write the index of a shard in the format of DALI's wds2idx, with one member a line."""
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


IMAGES = {f"{i}.jpg": bytes([65 + i]) * 700 for i in range(4)}
