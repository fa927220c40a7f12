"""Work on the images of a batch, shared out over threads."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor

from fastjepa.data.decode.images import BadImage


def for_each(work: Callable[[int], None], count: int, pool: Executor, num_threads: int) -> dict[int, str]:
    """Run work(0) to work(count - 1) on the pool's threads. Returns the reasons of those that raised BadImage, by number."""
    bad: dict[int, str] = {}

    def share(first: int) -> None:  # one task per thread: a task costs as much as a small image
        for position in range(first, count, num_threads):
            try:
                work(position)
            except BadImage as error:
                bad[position] = str(error)

    list(pool.map(share, range(num_threads)))
    return dict(sorted(bad.items()))
