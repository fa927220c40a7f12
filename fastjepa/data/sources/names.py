"""Unique names for samples: a sample's name is its identity."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from fastjepa.data.dataset import Ints, Strings

_Flags = npt.NDArray[np.bool_]


def unique_names(names: Strings) -> tuple[Strings, Ints]:
    """Make names unique: one that occurs again gets `#2`, `#3`, ... behind it (or the next number that makes a new name).

    Returns:
        The names, and the indices of those that were changed, int64 [k].
    """
    # Hashes take 8 bytes a name, where a set of the names would take a hundred.
    hashes = np.fromiter(map(hash, names), np.int64, len(names))
    ordered = np.sort(hashes)
    repeated = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    if not len(repeated):
        return names, np.empty(0, np.int64)
    changed = np.zeros(len(names), bool)
    made = Strings.of(_numbered(names, np.isin(hashes, repeated), ordered, changed))
    return made, np.flatnonzero(changed)


def _numbered(names: Strings, suspects: _Flags, ordered_hashes: Ints, changed: _Flags) -> Iterator[bytes]:
    """The unique names, in order.

    Args:
        names: the names.
        suspects: [n], True where another name has the same hash: only these may occur twice.
        ordered_hashes: int64 [n], the sorted hashes of all names.
        changed: [n], set to True here where a name gets a number.
    """
    count: dict[bytes, int] = {}
    for index, (name, suspect) in enumerate(zip(names, suspects.tolist(), strict=True)):
        if not suspect:
            yield name
        elif name not in count:  # it occurs for the first time
            count[name] = 1
            yield name
        else:
            changed[index] = True
            made = name
            # No two names that are made here are equal: what stands before the last # and the number behind it differ.
            while _holds(ordered_hashes, hash(made)):
                count[name] += 1
                made = b"%s#%d" % (name, count[name])
            yield made


def _holds(ordered: Ints, value: int) -> bool:
    place = int(np.searchsorted(ordered, value))
    return place < len(ordered) and int(ordered[place]) == value
