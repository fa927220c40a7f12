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
from fastjepa.data.sources.labels import sort_classes
from fastjepa.data.sources.names import unique_names
from fastjepa.errors import DataError

_FORMAT = (
    "expected a text file with one image path a line, absolute or relative to its own folder, and a label behind a tab if "
    "there are labels"
)
_OTHER_SEPARATOR = re.compile(rb"(.+?)[ ,;]\s*[^ ,;]+\s*")


def read_list_file(files: list[str]) -> Listing:
    """The images that a text file names, in its order.

    A line holds a path, absolute or relative to the file's folder, and behind a tab a label, an integer or a text. Either
    all lines have a label or none has. Blank lines and lines that start with # are passed over. Names need not be UTF-8.

    A path that is listed again is a sample of its own (more weight for an image), and gets `#2`, `#3`, ... behind its name.
    The images are not looked for: the run reports a missing one when it comes to it.

    Args:
        files: the text file, alone: every source is listed from a sequence of files.

    Raises:
        DataError: the file is not such a list; the message names the line.
    """
    (file,) = files
    numbers: dict[bytes, int] = {}
    labels_read = array("q")
    try:
        paths = Strings.of(_paths(file, numbers, labels_read))
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}); {_FORMAT}") from error
    if not paths:
        raise DataError(f"{file}: lists nothing; {_FORMAT}")
    root = os.path.dirname(file)  # noqa: PTH120 (as it is, unresolved)
    names, repeated = unique_names(paths)
    spans = None
    if len(repeated):
        repeated_files = dict.fromkeys(paths[i] for i in repeated)
        place = {path: i for i, path in enumerate(repeated_files)}
        spans = Spans(
            Strings.of(repeated_files),
            np.full(len(names), -1, np.int32),
            np.zeros(len(names), np.int64),
            np.full(len(names), -1, np.int64),
        )
        spans.file[repeated] = [place[paths[i]] for i in repeated]
    labels: Ints | None = None
    class_names: tuple[str, ...] = ()
    if numbers:
        values = [value.decode("utf-8", "backslashreplace") for value in numbers]
        labels, class_names = sort_classes(np.array(labels_read, np.int64), values)
    return Listing(ImageDataset(root, names, labels, class_names, spans), [os.fsencode(file)])


def _paths(file: str, numbers: dict[bytes, int], labels_read: array[int]) -> Iterator[bytes]:
    """The paths, one a line. On the way, each new label gets a number in `numbers`, and the number of each path's label is
    appended to `labels_read`."""
    with Path(file).open("rb") as lines:
        if b"\0" in lines.read(1 << 16):
            raise DataError(f"{file}: holds NUL bytes, so it is no text in UTF-8; {_FORMAT}")
        lines.seek(0)
        first_line = 0  # the number of the first line with a path
        for line_number, line in enumerate(lines, 1):
            if line_number == 1:  # it may start with a byte order mark
                line = line.removeprefix(b"\xef\xbb\xbf")
            path, _, label = line.rstrip(b"\r\n").partition(b"\t")
            label = label.strip()
            if line.startswith(b"#") or not (path.strip() or label):
                continue
            if b"\0" in line or b"\t" in label or not path:
                raise DataError(f"{file}, line {line_number}: {line[:200]!r}; {_FORMAT}")
            if not first_line:
                first_line = line_number
                other = _OTHER_SEPARATOR.fullmatch(path)
                if other and is_image_name(other[1]) and not is_image_name(path):
                    raise DataError(
                        f"{file}, line {line_number}: no tab between path and label in {line[:200]!r}; {_FORMAT}"
                    )
            elif bool(label) != bool(numbers):
                has, but = ("a", "none") if label else ("no", "one")
                raise DataError(
                    f"{file}, line {line_number}: has {has} label, but line {first_line} has {but}; {_FORMAT}"
                )
            if label:
                labels_read.append(numbers.setdefault(label, len(numbers)))
            yield path
