"""Where the members of a tar file lie: by its headers, or by the index file that DALI's `wds2idx` writes beside it.

The standard library's `tarfile` takes three times as long for a header, and ends silently at a damaged one.
Formats: POSIX.1-1988 (ustar) and 2001 (pax), GNU long names, old and new sparse files.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_BLOCK = 512
_READ_AHEAD = 4096  # a header, the headers behind a small member, a label
_LONGEST_NAME = 1 << 20
_REGULAR, _WITHOUT_DATA = b"0\x007", b"123456"  # types: files; links, devices, folders


class Member(NamedTuple):
    """A regular file of the archive."""

    name: bytes
    start: int
    size: int


class BrokenTar(Exception):
    """The archive, or its index, cannot be read on from here; the message is the reason."""


class TarReader:
    """Reads at any place of a tar file. Close it after use, as a context manager does."""

    def __init__(self, path: str) -> None:
        """
        Raises:
            OSError: the file cannot be opened.
        """
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.length = os.fstat(self._descriptor).st_size
        self._ahead, self._ahead_start = b"", 0

    def __enter__(self) -> TarReader:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def read(self, start: int, size: int) -> bytes:
        """Fewer bytes where the file ends.

        Raises:
            OSError
        """
        offset = start - self._ahead_start
        if not 0 <= offset <= len(self._ahead) - size:
            self._ahead = os.pread(self._descriptor, max(size, _READ_AHEAD), start)
            self._ahead_start, offset = start, 0
        return self._ahead[offset : offset + size]

    def members(self) -> Iterator[Member]:
        """Regular files in the order of the archive, but for sparse ones, whose bytes are not in one piece.

        Raises:
            BrokenTar: the archive ends early or is damaged here; what came before is good.
            OSError
        """
        position, long_name, records = 0, b"", dict[bytes, bytes]()
        while True:
            header = self.read(position, _BLOCK)
            if len(header) == _BLOCK and not any(header):
                return
            if position == 0 and (len(header) < _BLOCK or not _is_header(header)):
                raise BrokenTar("it is no tar archive (compressed ones cannot be used)" if header else "it is empty")
            if len(header) < _BLOCK:
                raise BrokenTar(f"it ends after {self.length} bytes without an end mark: perhaps it was cut short")
            if not _is_header(header):
                raise BrokenTar(f"the header at byte {position} is damaged")
            name, size, kind = _name(header), _number(header[124:136]), header[156:157]
            data = position + _BLOCK
            if kind in b"KLgx":  # says something of the next member, or of all: its name is what counts here
                if kind in b"Lx":
                    content = self.read(data, size) if size <= _LONGEST_NAME else b""
                    if len(content) < size:
                        raise BrokenTar(f"the header at byte {position} is damaged")
                    if kind == b"L":
                        long_name = content.partition(b"\0")[0]
                    else:
                        records = _pax_records(content)
                position = data + _padded(size)
                continue
            name, size = records.get(b"path", long_name or name), _decimal(records.get(b"size"), size)
            sparse = kind == b"S" or any(key.startswith(b"GNU.sparse.") for key in records)
            long_name, records = b"", {}
            more = kind == b"S" and header[482] != 0
            while more:
                more = self.read(data, _BLOCK)[504:505] > b"\0"
                data += _BLOCK
            if kind in _WITHOUT_DATA:
                position = data
                continue
            position = data + _padded(size)
            if data + size > self.length:
                raise BrokenTar(f"it ends after {self.length} bytes, within {name.decode('utf-8', 'backslashreplace')}")
            if kind in _REGULAR and not sparse and not name.endswith(b"/"):
                yield Member(name, data, size)

    def members_by_index(self, path: str) -> list[Member] | None:
        """The members that an index file names, as `members` would give them; None if it does not fit, or does not say all.

        The file: `v1.2 SAMPLES`, then a line a sample, of `extension offset size name` for each member. Version 1.1 lacks
        the names, by which samples are known. It is made of the output of GNU tar, so unusual names are escaped in it, and
        the offsets of members with GNU long names are wrong.
        """
        try:
            first, *lines = Path(path).read_bytes().split(b"\n")
            members: list[Member] = []
            for line in lines:
                # A name with a space makes too many fields, or fields that are no numbers.
                for extension, start, size, name in zip(*[iter(line.split())] * 4, strict=True):
                    if len(name) > 100 or b"\\" in name or not name.endswith(b"." + extension):
                        return None
                    members.append(Member(name, int(start), int(size)))
            complete = first == b"v1.2 %d" % len([line for line in lines if line])
            fits = members and self._is_at(members[0]) and self._is_at(members[-1])
        except (OSError, ValueError):
            return None
        return members if complete and fits else None

    def _is_at(self, member: Member) -> bool:
        if member.start < _BLOCK or member.start + member.size > self.length:
            return False
        header = self.read(member.start - _BLOCK, _BLOCK)
        return len(header) == _BLOCK and _is_header(header) and _number(header[124:136]) == member.size


def _is_header(block: bytes) -> bool:
    """Whether the checksum is right, which counts its own field as spaces, and the size is a number."""
    return sum(block) - sum(block[148:156]) + 8 * 32 == _number(block[148:156]) and _number(block[124:136]) >= 0


def _number(field: bytes) -> int:
    """Octal digits, or big-endian behind a byte 0x80; -1 for anything else."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:])
    try:
        return int(field.strip(b"\0 ") or b"0", 8)
    except ValueError:
        return -1


def _decimal(field: bytes | None, default: int) -> int:
    return int(field) if field is not None and field.isdigit() else default


def _name(header: bytes) -> bytes:
    name = header[:100].partition(b"\0")[0]
    prefix = header[345:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _pax_records(content: bytes) -> dict[bytes, bytes]:
    """Lines of `length key=value`, where the length counts all of the line; a value may hold anything."""
    records: dict[bytes, bytes] = {}
    while content:
        length = _decimal(content.partition(b" ")[0], 0)
        key, _, value = content[:length].partition(b" ")[2].removesuffix(b"\n").partition(b"=")
        records[key] = value
        content = content[length:] if length else b""
    return records


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK
