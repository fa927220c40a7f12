"""The layout of the training state on this rank, which an engine offers to checkpoints."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from fastjepa.optim.adamw_ema import AdamWEMA


@dataclass(frozen=True)
class Piece:
    """Consecutive elements of a parameter or state buffer, and their place in an fp32 tensor that this rank holds."""

    name: str
    """Name of the parameter or state buffer within the objective."""
    start: int
    """Index of the first element in the flattened parameter."""
    numel: int
    """Number of elements."""
    tensor: Tensor
    """The tensor that holds them: a parameter of the optimizer (weights or, in a part that averages another, the EMA), whose
    moments in optimizer.state have the same layout; or the state buffer itself, which has no moments."""
    offset: int
    """Index of the first element in the flattened tensor."""
    written: bool = True
    """True if this rank writes the piece into a checkpoint, False if another rank holds the same and writes it."""

    def view(self, tensor: Tensor) -> Tensor:
        """The elements of the piece in `tensor`, which has the same layout as `self.tensor`."""
        return tensor.detach().view(-1)[self.offset : self.offset + self.numel]


class ShardedState(ABC):
    """The fp32 state of training (weights, EMA, moments, state buffers), of which each rank holds pieces."""

    optimizer: AdamWEMA

    @abstractmethod
    def pieces(self) -> list[Piece]:
        """The pieces of the fp32 state that this rank holds."""

    @abstractmethod
    def shapes(self) -> dict[str, list[int]]:
        """The full shape of every parameter and state buffer by name, even if ZeRO shards it."""

    @abstractmethod
    def constants(self) -> Mapping[str, Tensor]:
        """Buffers that are never trained (position tables), fp32 on the CPU, by name: readers of the weights need them.

        Raises:
            TypeError: one has changed in training.
        """

    @abstractmethod
    def publish_weights(self) -> None:
        """Bring the model's weights on all ranks up to date with the fp32 state. Call it after writing to that state."""
