"""A text file that lists images."""

from __future__ import annotations

import os
import re
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fastjepa.data.dataset import ImageDataset, Ints, Spans, Strings
from fastjepa.data.sources.folder import is_image_name
from fastjepa.data.sources.index import Listing
from fastjepa.data.sources.labels import classes
from fastjepa.data.sources.names import unique
from fastjepa.errors import DataError

_FORMAT = (
    "expected a text file with one image path a line, absolute or relative to its own folder, and a label behind a tab if "
    "there are labels"
)
_OTHER_SEPARATOR = re.compile(rb"(.+?)[ ,;]\s*[^ ,;]+\s*")


def list_list_file(files: list[str]) -> Listing:
    """The images that a text file (a list of one) names, in its order: a path a line, absolute or relative to the file's
    folder, and a label behind a tab, an integer or a text; all lines have one, or none has. Blank lines and lines that
    start with # are passed over. Names need not be UTF-8.

    A path that is listed again is a sample of its own (more weight for an image), and gets `#2`, `#3`, ... behind its name.
    Whether the files are there is not looked at: of those that are not, the run says so when it comes to them.

    Raises:
        DataError: not such a file; the message names the line.
    """
    (file,) = files
    number: dict[bytes, int] = {}
    numbers = array("q")
    try:
        paths = Strings.of(_paths(file, number, numbers))
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}); {_FORMAT}") from error
    if not paths:
        raise DataError(f"{file}: lists nothing; {_FORMAT}")
    root = os.path.dirname(file)  # noqa: PTH120 (as it is, unresolved)
    names, again = unique(paths)
    spans = None
    if len(again):
        files_again = dict.fromkeys(paths[i] for i in again)
        place = {path: i for i, path in enumerate(files_again)}
        spans = Spans(
            Strings.of(files_again),
            np.full(len(names), -1, np.int32),
            np.zeros(len(names), np.int64),
            np.full(len(names), -1, np.int64),
        )
        spans.file[again] = [place[paths[i]] for i in again]
    labels: Ints | None = None
    class_names: tuple[str, ...] = ()
    if number:
        values = [value.decode("utf-8", "backslashreplace") for value in number]
        labels, class_names = classes(np.array(numbers, np.int64), values)
    return Listing(ImageDataset(root, names, labels, class_names, spans), [os.fsencode(file)])


def _paths(file: str, number: dict[bytes, int], numbers: array[int]) -> Iterator[bytes]:
    """The paths. Labels go to `number`, in the order in which they occur, and the number of each path's to `numbers`."""
    with Path(file).open("rb") as lines:
        if b"\0" in lines.read(1 << 16):
            raise DataError(f"{file}: holds NUL bytes, so it is no text (in UTF-8); {_FORMAT}")
        lines.seek(0)
        first = 0  # line with a path
        for place, line in enumerate(lines, 1):
            if place == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            path, _, label = line.rstrip(b"\r\n").partition(b"\t")
            label = label.strip()
            if line.startswith(b"#") or not (path.strip() or label):
                continue
            if b"\0" in line or b"\t" in label or not path:
                raise DataError(f"{file}, line {place}: {line[:200]!r}; {_FORMAT}")
            if not first:
                first = place
                other = _OTHER_SEPARATOR.fullmatch(path)
                if other and is_image_name(other[1]) and not is_image_name(path):
                    raise DataError(f"{file}, line {place}: no tab between path and label in {line[:200]!r}; {_FORMAT}")
            elif bool(label) != bool(number):
                has, but = ("a", "none") if label else ("no", "one")
                raise DataError(f"{file}, line {place}: has {has} label, but line {first} has {but}; {_FORMAT}")
            if label:
                numbers.append(number.setdefault(label, len(number)))
            yield path
