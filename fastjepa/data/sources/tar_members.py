"""Members of a tar file and where they lie: read from its headers, or from the index file that DALI's `wds2idx` writes."""

from __future__ import annotations

import errno
import os
import stat
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_ENCODING, _ERRORS = "utf-8", "surrogateescape"


class Member(NamedTuple):
    """A regular file in the archive."""

    name: bytes
    start: int
    """The first byte of its content, in the archive."""
    size: int
    """Bytes of its content."""


class BrokenTar(Exception):
    """The archive cannot be read any further; the message is the reason."""


class TarReader:
    """Lists the members of a tar file and reads at any place of it. Use it in a `with` statement, which closes the file."""

    def __init__(self, path: str) -> None:
        """
        Raises:
            OSError: the file cannot be opened, or is no regular file.
        """
        # O_NONBLOCK: opening a pipe would wait for ever.
        self._file = os.fdopen(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb")
        status = os.fstat(self._file.fileno())
        if not stat.S_ISREG(status.st_mode):
            self._file.close()
            raise OSError(errno.EINVAL, "not a regular file")
        self.length = status.st_size

    def __enter__(self) -> TarReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, start: int, size: int) -> bytes:
        """Read `size` bytes from `start` on, or fewer where the file ends.

        Raises:
            OSError: the file cannot be read.
        """
        return os.pread(self._file.fileno(), size, start)

    def members(self) -> Iterator[Member]:
        """The regular files, in the order of the archive. Sparse files are left out: their bytes are not in one piece.

        Raises:
            BrokenTar: the archive ends early or is damaged here; the members before are good.
            OSError: the file cannot be read.
        """
        try:
            tar = tarfile.open(fileobj=self._file, mode="r:", encoding=_ENCODING, errors=_ERRORS)  # noqa: SIM115
            while (info := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep all of them
                if info.size < 0 or "\0" in info.name:  # tarfile would read the same header for ever
                    raise BrokenTar(f"the header before byte {info.offset_data} is damaged")
                if info.offset_data + info.size > self.length:
                    name = info.name.encode(_ENCODING, "backslashreplace").decode()
                    raise BrokenTar(f"it ends after {self.length} bytes, within {name}")
                if info.isreg() and not info.issparse():
                    name = info.name.removeprefix("./")  # from an archive of the folder `.`
                    yield Member(name.encode(_ENCODING, _ERRORS), info.offset_data, info.size)
        except (tarfile.TarError, ValueError, EOFError) as error:
            if self.length and not self._is_a_tar():
                raise BrokenTar("it is no tar archive (compressed ones cannot be used)") from error
            raise BrokenTar(f"{error} (it has {self.length} bytes)") from error
        # tarfile stops without an error at a damaged header and at the end of the file.
        mark = self.read(tar.offset, tarfile.BLOCKSIZE)
        if len(mark) < tarfile.BLOCKSIZE:
            raise BrokenTar(f"it ends after {self.length} bytes without an end mark: perhaps it was cut short")
        if any(mark):
            raise BrokenTar(f"the header at byte {tar.offset} is damaged")

    def _is_a_tar(self) -> bool:
        try:
            tarfile.TarInfo.frombuf(self.read(0, tarfile.BLOCKSIZE), _ENCODING, _ERRORS)
        except tarfile.HeaderError:
            return False
        return True

    def members_by_index(self, path: str) -> list[Member] | None:
        """The members that an index file names, as `members` would give them; None if the file does not fit, or lacks some.

        The format is `v1.2 SAMPLES`, then a line a sample, which holds `extension offset size name` for each member. Version
        1.1 lacks the names, by which samples are known. wds2idx makes the file from the output of GNU tar, so unusual names
        are escaped in it, and the offsets of members with GNU long names are wrong: a file with either does not fit.
        """
        try:
            first, *lines = Path(path).read_bytes().split(b"\n")
            members: list[Member] = []
            for line in lines:
                # A name with a space makes too many fields, or fields that are no numbers.
                for extension, start, size, name in zip(*[iter(line.split())] * 4, strict=True):
                    if len(name) > 100 or b"\\" in name or not name.endswith(b"." + extension):
                        return None
                    member = Member(name, int(start), int(size))
                    if not (0 <= member.start <= member.start + member.size <= self.length and member.size >= 0):
                        return None
                    members.append(member)
            complete = first == b"v1.2 %d" % len([line for line in lines if line])
            fits = members and self._is_at(members[0]) and self._is_at(members[-1])
        except (OSError, ValueError):
            return None
        return members if complete and fits else None

    def _is_at(self, member: Member) -> bool:
        """True if the header before the member's place has its size."""
        if member.start < tarfile.BLOCKSIZE or member.start + member.size > self.length:
            return False
        header = self.read(member.start - tarfile.BLOCKSIZE, tarfile.BLOCKSIZE)
        try:
            return tarfile.TarInfo.frombuf(header, _ENCODING, _ERRORS).size == member.size
        except tarfile.HeaderError:
            return False
