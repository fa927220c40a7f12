"""Work on the images of a batch, shared out over the threads of a pool."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor

from fastjepa.data.image_errors import BadImage


def for_each(work: Callable[[int], None], count: int, pool: Executor, num_threads: int) -> dict[int, str]:
    """Run work(0) to work(count - 1) on `num_threads` threads of the pool, and wait for all of them.

    Returns:
        Number -> reason of every call that raised BadImage, in ascending order. Any other error is raised.
    """
    bad: dict[int, str] = {}

    # Each thread gets one task, which takes every num_threads-th number: a task per number would cost as much as decoding a
    # small image.
    def run_share(first: int) -> None:
        for number in range(first, count, num_threads):
            try:
                work(number)
            except BadImage as error:
                bad[number] = str(error)

    list(pool.map(run_share, range(num_threads)))
    return dict(sorted(bad.items()))
