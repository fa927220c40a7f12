"""Tar shards as WebDataset writes them: members that stand side by side and share a key are one sample."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from fastjepa.data.dataset import Strings
from fastjepa.data.image_errors import reason_of
from fastjepa.data.sources.file_samples import FileSamples, common_folder, join
from fastjepa.data.sources.folder import IMAGE_EXTENSIONS, is_image_name
from fastjepa.data.sources.index import Listing
from fastjepa.data.sources.names import unique_names
from fastjepa.data.sources.tar_members import BrokenTar, Member, TarReader
from fastjepa.errors import DataError

_SHARDS_AT_ONCE = 16  # threads: on a network file system every header is a wait
_LONGEST_LABEL = 1024  # bytes
_NAMED_SHARDS = 5


def list_shards(files: list[str]) -> Listing:
    """The samples of uncompressed tar files, in the order of the files and of their members.

    A member's key is its path up to the first dot of its base name. The image of a sample is its first member with an image
    extension. Its label is the content of its `.cls` member, an integer or a text; labels are used if all samples have one.
    Members without a dot or with nothing before it (`._x.jpg`), and samples without an image, are passed over. A sample is
    named after its shard and member; a name that the shard has already gets `#2`, `#3`, ... behind it.

    An index file of DALI's `wds2idx` (`x.idx` beside `x.tar`, and not older) saves reading the headers.

    If a shard is damaged or cut short, the samples before that place are used. A shard that is missing or unreadable is left
    out. A warning tells either.

    Raises:
        DataError: no shard holds an image.
    """
    root = common_folder(files)
    with ThreadPoolExecutor(_SHARDS_AT_ONCE) as pool:
        shards = list(pool.map(lambda file: _list_shard(root, file), files))
    warnings = [shard.problem for shard in shards if shard.problem]
    if missing := [file for file, shard in zip(files, shards, strict=True) if shard.missing]:
        named = ", ".join(missing[:_NAMED_SHARDS]) + (", ..." if len(missing) > _NAMED_SHARDS else "")
        warnings.insert(0, f"{len(missing)} of {len(files)} shards are missing: {named}")
    if without_image := sum(shard.without_image for shard in shards):
        warnings.append(f"{root}: passed over {without_image} samples without an image")
    parts = [shard.samples for shard in shards if len(shard.samples.names)]
    if not parts:
        looked_for = " ".join(sorted(IMAGE_EXTENSIONS))
        raise DataError("; ".join([f"no images in the shards; looked for members with {looked_for}", *warnings]))
    watched = [os.fsencode(path) for file in files for path in (file, _index_of(file))]
    listing = join(root, parts, watched, warnings)
    listing.complete = not any(shard.unreadable for shard in shards)
    return listing


@dataclass(frozen=True)
class _Shard:
    samples: FileSamples
    without_image: int
    """The number of samples that were passed over."""
    missing: bool
    unreadable: bool
    """True: it could not be read just now; it may be whole."""
    problem: str | None
    """A warning."""


def _list_shard(root: str, file: str) -> _Shard:
    names, labels = list[bytes](), array("q")
    starts, sizes = array("q"), array("q")
    values: dict[str, int] = {}
    without_image, reasons, missing, unreadable = 0, list[str](), False, False
    shard = os.fsencode(os.path.relpath(file, root))
    try:
        with TarReader(file) as tar:
            for image, label in _samples(tar, _members(tar, file, reasons)):
                if image is None:
                    without_image += 1
                    continue
                names.append(shard + b"/" + image.name)
                starts.append(image.start)
                sizes.append(image.size)
                labels.append(-1 if label is None else values.setdefault(label, len(values)))
    except FileNotFoundError:
        missing = True
    except OSError as error:
        unreadable = True
        reasons.append(reason_of(error))
    if reasons and values and labels[-1] < 0:  # the last sample lost its label to the damage
        for column in (names, labels, starts, sizes):
            column.pop()
    samples = FileSamples(
        names=unique_names(Strings.of(names))[0],
        files=[shard],
        file=np.zeros(len(names), np.int64),
        start=np.array(starts, np.int64),
        size=np.array(sizes, np.int64),
        labels=np.array(labels, np.int64),
        values=list(values),
    )
    problem = f"{file}: {reasons[0]}; {len(names)} samples found before are used" if reasons else None
    return _Shard(samples, without_image, missing, unreadable, problem)


def _members(tar: TarReader, file: str, reasons: list[str]) -> Iterator[Member]:
    """The members up to the place where the shard is broken. The reason is appended to `reasons`."""
    index = _index_of(file)
    indexed = tar.members_by_index(index) if _is_up_to_date(index, file) else None
    try:
        yield from tar.members() if indexed is None else indexed
    except BrokenTar as error:
        reasons.append(str(error))


def _samples(tar: TarReader, members: Iterator[Member]) -> Iterator[tuple[Member | None, str | None]]:
    """The image and the label of each sample; None for what it lacks."""
    key: bytes | None = None
    image: Member | None = None
    label: str | None = None
    for member in members:
        folder, slash, base = member.name.rpartition(b"/")
        stem, dot, extension = base.partition(b".")
        if not (stem and dot):
            continue
        if folder + slash + stem != key:
            if key is not None:
                yield image, label
            key, image, label = folder + slash + stem, None, None
        if image is None and is_image_name(base):
            image = member
        elif label is None and extension.lower() == b"cls" and member.size <= _LONGEST_LABEL:
            label = tar.read(member.start, member.size).decode("utf-8", "backslashreplace").strip() or None
    if key is not None:
        yield image, label


def _index_of(file: str) -> str:
    """The path that `wds2idx` gives to the index of a shard."""
    return file.removesuffix(".tar") + ".idx"


def _is_up_to_date(index: str, file: str) -> bool:
    try:
        return os.stat(index).st_mtime_ns >= os.stat(file).st_mtime_ns  # noqa: PTH116 (as fast as it gets)
    except OSError:
        return False
