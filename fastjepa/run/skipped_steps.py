"""Steps that changed nothing, because their loss or a gradient was not finite: how many, and which samples they had."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastjepa import distributed
from fastjepa.run.folder import RunFolder


class _Step(NamedTuple):
    """The facts of a step that a report may need. Losses and count are on the device."""

    number: int
    samples: Sequence[npt.NDArray[np.int64]]
    """Indices in the data set, for each micro batch."""
    losses: Sequence[Tensor]
    """The loss of each micro batch."""
    skipped_in_a_row: Tensor


class SkippedSteps:
    """Remembers the last steps, so that one look at every `limit`-th step, or more often, can name all that were skipped.

    Args:
        limit: number of skipped steps in a row at which the run stops.
        name_of: the name of a sample, by its index.
    """

    def __init__(self, limit: int, folder: RunFolder, name_of: Callable[[int], str]) -> None:
        self._limit, self._folder, self._name_of = limit, folder, name_of
        self._recent: deque[_Step] = deque(maxlen=2 * limit)

    def note(
        self, step: int, samples: Sequence[npt.NDArray[np.int64]], losses: Sequence[Tensor], skipped_in_a_row: Tensor
    ) -> None:
        """Remember a step. Nothing is read back from the device."""
        self._recent.append(_Step(step, samples, losses, skipped_in_a_row))

    def look(self, done: int) -> tuple[int, str | None]:
        """Count the last steps that were skipped, read back from the device. All ranks call it, and get the same.

        Args:
            done: steps so far.

        Returns:
            The number, and the problem in words if it was too many; skipped_steps.jsonl names their samples then.
        """
        in_a_row: list[int] = torch.stack([step.skipped_in_a_row for step in self._recent]).tolist()
        longest = max(in_a_row)
        if longest < self._limit:
            return in_a_row[-1], None
        mine: list[dict[str, object]] = [
            {
                "step": step.number,
                "rank": distributed.rank(),
                "loss": str(loss.item()),
                "samples": [self._name_of(index) for index in samples.tolist()],
            }
            for step, skipped in zip(self._recent, in_a_row, strict=True)
            for samples, loss in zip(step.samples, step.losses, strict=True)
            if skipped
        ]
        lines = [line for lines in distributed.gather_objects(mine) for line in lines]
        if distributed.rank() == 0:
            self._folder.write_skipped_steps(lines)
        return in_a_row[-1], (
            f"the loss or a gradient was not finite in {longest} steps in a row, by step {done}: they changed nothing. "
            f"{self._folder.skipped_steps} has the losses and the samples of the last"
        )
