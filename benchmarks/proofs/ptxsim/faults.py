"""The faults of a kernel: one class for each kind, so that a test can name the fault that it planted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt


class Fault(Exception):
    """The kernel did something that fails on a GPU, or works there only by luck.

    `where` is the index of the first wrong access among those of a call. `blame` turns it into a lane, and the machine turns
    that into a CTA and a thread.
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
    """Two warps (or CTAs) access the same bytes in no order, and one of them writes."""


class PendingFault(Fault):
    """Data of an asynchronous copy or matrix product is used before the wait for it."""


class DivergenceFault(Fault):
    """Only a part of a warp reaches a barrier or an instruction of whole warps."""


def first(bad: npt.NDArray[np.bool_]) -> int:
    """Index of the first row that has a True."""
    return int(np.argmax(bad.reshape(bad.shape[0], -1).any(axis=1)))


@contextmanager
def blame(lanes: npt.NDArray[np.int64]) -> Iterator[None]:
    """Blame faults inside on lanes: access number i is that of `lanes[i]`."""
    try:
        yield
    except Fault as fault:
        fault.where = int(lanes[fault.where])
        raise
