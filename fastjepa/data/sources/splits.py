"""Splits of a source: recognise what `data.source` is, and divide its files into `train` and `val`."""

from __future__ import annotations

import glob
import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastjepa.config import DataConfig
from fastjepa.data.dataset import ImageDataset, printable
from fastjepa.data.sources.folder import entries, is_image_name, list_folder
from fastjepa.data.sources.index import Listing, indexed
from fastjepa.data.sources.list_file import read_list_file
from fastjepa.data.sources.tables import list_tables
from fastjepa.data.sources.webdataset import list_shards
from fastjepa.errors import DataError

logger = logging.getLogger(__name__)

VAL_NAMES = ("val", "validation", "valid", "test")

_Lister = Callable[[list[str]], Listing]
_BY_SUFFIX: dict[str, _Lister] = {".tar": list_shards, ".arrow": list_tables, ".parquet": list_tables}
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_SUFFIXES = tuple(suffix.encode() for suffix in _BY_SUFFIX)
_SPLIT_WORD = re.compile(rf"(?:^|[^a-z])(train|{'|'.join(VAL_NAMES)})(?:[^a-z]|$)")
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")


@dataclass(frozen=True)
class _SplitFiles:
    """The files of one split, or its folder, and the function that lists their images."""

    files: list[str]
    lister: _Lister

    def open(self) -> ImageDataset:
        return indexed("\0".join([self.lister.__name__, *self.files]), lambda: self.lister(self.files))


def open_dataset(config: DataConfig, split: Literal["train", "val"]) -> ImageDataset | None:
    """Open one split of data.source. Split `val` comes from data.val_source if that is given.

    Returns:
        The data set, or None if the source has no such split.

    Raises:
        DataError: the source is missing, unreadable or holds no images; the message names the setting.
    """
    key = "val_source" if split == "val" and config.val_source else "source"
    source: str = getattr(config, key)
    try:
        splits = _splits_of(source)
        if key == "val_source":  # all of it is held out, unless it has a split `val` of its own
            splits = {"val": splits.get("val") or splits["train"]}
        if split == "train" and "train" not in splits:
            raise DataError("nothing in it is named train; give the files or the folder to train on")
        return splits[split].open() if split in splits else None
    except DataError as error:
        raise DataError(f"data.{key} = {source}: {error}") from error
    except OSError as error:
        where = printable(error.filename) if error.filename else "it"
        raise DataError(f"data.{key} = {source}: {where} cannot be read ({error.strerror})") from error


def _splits_of(source: str) -> dict[str, _SplitFiles]:
    """The splits that a source has: `train` or `val` or both."""
    if not source:
        raise DataError("expected the path of images, shards, tables or a list of files, or fashion_mnist")
    if source == "fashion_mnist":
        from fastjepa.data.sources.embedded import fashion_mnist  # not above: only runs that use it pay for the import

        return _splits_of_folder(fashion_mnist())
    path = Path(os.path.abspath(Path(source).expanduser()))  # noqa: PTH100 (links stay as they are)
    if path.is_dir():
        return _splits_of_folder(path)
    if path.name.endswith(_COMPRESSED):
        raise DataError("compressed shards cannot be read in place: expected .tar; unpack it (gzip -d, zstd -d, ...)")
    if path.is_file():
        return {"train": _SplitFiles([str(path)], _BY_SUFFIX.get(path.suffix, read_list_file))}
    if any(c in source for c in "{*?["):
        return _splits_by_name(_matching(str(path)))
    raise DataError("No such file or folder; expected images, shards, tables or a list of files, or fashion_mnist")


def _splits_of_folder(folder: Path) -> dict[str, _SplitFiles]:
    if (folder / "train").is_dir():
        splits = {"train": _all_of(folder / "train")}
        val = next((folder / name for name in VAL_NAMES if (folder / name).is_dir()), None)
        beside = {
            printable(entry.name) for entry in entries(os.fsencode(folder)) if entry.is_dir(follow_symlinks=False)
        }
        if unused := sorted(beside - {"train", *VAL_NAMES}):
            named = ", ".join(unused[:10])
            logger.warning(
                "%s: its folder train holds the training images; not used: %s", printable(str(folder)), named
            )
        return splits if val is None else splits | {"val": _all_of(val)}
    everything = _all_of(folder)
    return {"train": everything} if everything.lister is list_folder else _splits_by_name(everything.files)


def _all_of(folder: Path) -> _SplitFiles:
    """Everything in a folder: its shards or tables if it has some, else its images."""
    files: list[str] = []
    image = None
    for entry in entries(os.fsencode(folder)):
        name = os.fsdecode(entry.name)
        if entry.name.endswith(_SUFFIXES) and not entry.is_dir():
            files.append(name)
        elif image is None and (is_image_name(entry.name) or entry.is_dir(follow_symlinks=False)):
            image = name
    # `datasets` keeps results of its own computations beside the data.
    files = sorted(name for name in files if not (name.startswith(("cache-", "tmp")) and name.endswith(".arrow")))
    if not files:
        return _SplitFiles([str(folder)], list_folder)
    if image is not None:
        raise DataError(
            f"{folder} holds {files[0]} and {image}: say which are meant, with a pattern such as "
            f"{folder}/*{Path(files[0]).suffix}, or move them apart"
        )
    return _SplitFiles([str(folder / name) for name in files], _lister_for(files))


def _lister_for(files: list[str]) -> _Lister:
    suffixes = sorted({Path(file).suffix for file in files})
    if len({_BY_SUFFIX.get(suffix) for suffix in suffixes}) > 1 or suffixes[0] not in _BY_SUFFIX:
        raise DataError(f"files of the kinds {', '.join(suffixes)}: expected one of {', '.join(_BY_SUFFIX)}")
    return _BY_SUFFIX[suffixes[0]]


def _splits_by_name(files: list[str]) -> dict[str, _SplitFiles]:
    """Divide shards or tables by the split that their names tell; all are `train` if the names tell no two apart."""
    lister = _lister_for(files)
    by_word: dict[str | None, list[str]] = {}
    for file in files:
        word = _SPLIT_WORD.search(Path(file).name.lower())
        by_word.setdefault(word and word[1], []).append(file)
    if len(by_word) == 1:
        return {"train": _SplitFiles(files, lister)}
    if None in by_word:
        raise DataError(
            f"{by_word[None][0]}: its name tells no split, but other names do; expected train, or one of "
            f"{', '.join(VAL_NAMES)}, in all names or in none"
        )
    val = next((by_word[name] for name in VAL_NAMES if name in by_word), None)
    found = {"train": by_word.get("train"), "val": val}
    return {split: _SplitFiles(names, lister) for split, names in found.items() if names}


def _matching(pattern: str) -> list[str]:
    """The files that a pattern stands for, sorted. {0000..0146} counts, whether files exist or not; * ? [ ] match."""
    patterns = [pattern]
    while braces := _BRACES.search(patterns[0]):
        first, last = braces.groups()
        if int(first) > int(last):
            raise DataError(f"{braces[0]} counts nothing; expected the smaller number first")
        numbers = [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
        patterns = [_BRACES.sub(number, one, count=1) for one in patterns for number in numbers]
    files: dict[str, None] = {}  # each file once: {1..10}* finds some twice
    for one in patterns:
        is_glob = any(c in one for c in "*?[") and not Path(one).exists()  # a folder's name may hold brackets
        files |= dict.fromkeys(sorted(glob.glob(one)) if is_glob else [one])  # noqa: PTH207
    if not any(map(os.path.exists, files)):
        raise DataError("no file matches the pattern ({first..last} counts; * ? [ ] match)")
    return list(files)
