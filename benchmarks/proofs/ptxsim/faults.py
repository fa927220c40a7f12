"""What a kernel can do wrong: one class each, so that a test can say which fault it planted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt


class Fault(Exception):
    """The kernel did something that a GPU would not forgive, or would forgive only by luck.

    `where` is the index of the first offending access among those that were handed in. On its way up, `blame` makes it
    a lane, and the machine a CTA and a thread.
    """

    def __init__(self, message: str, where: int = 0) -> None:
        super().__init__(message)
        self.where = where


class OutOfBoundsFault(Fault):
    """An access outside the tensors of the launch, or outside the CTA's shared memory."""


class MisalignedFault(Fault):
    """An address that is not a multiple of the access's size."""


class UninitialisedFault(Fault):
    """A read of shared memory that this CTA never wrote."""


class RaceFault(Fault):
    """Two warps (or CTAs) touch the same bytes, one of them writing, with nothing that orders them."""


class PendingFault(Fault):
    """Data of an asynchronous copy or matrix product used before it was waited for."""


class DivergenceFault(Fault):
    """A barrier, or an instruction of whole warps, that only a part of a warp reaches."""


def first(bad: npt.NDArray[np.bool_]) -> int:
    """The row of the first True."""
    return int(np.argmax(bad.reshape(bad.shape[0], -1).any(axis=1)))


@contextmanager
def blame(lanes: npt.NDArray[np.int64]) -> Iterator[None]:
    """Around accesses made for these lanes, in order: a fault in one of them is that lane's."""
    try:
        yield
    except Fault as fault:
        fault.where = int(lanes[fault.where])
        raise
