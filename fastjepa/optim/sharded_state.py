"""How the state of training lies in the tensors of this rank: what an engine offers to checkpoints."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from fastjepa.optim.adamw_ema import AdamWEMA


@dataclass(frozen=True)
class Piece:
    """A run of a tensor's elements within an fp32 tensor that this rank holds."""

    name: str
    """The name of a parameter, or of a state buffer, within the objective."""
    start: int
    """First element, in the flattened parameter."""
    numel: int
    tensor: Tensor
    """The optimizer's parameter: weights (of a part that averages another: the EMA). Its moments lie alike in
    optimizer.state. A state buffer is its own tensor and has no moments."""
    offset: int
    """First element, in the flattened tensor."""
    written: bool = True
    """Whether this rank writes it into a checkpoint (False: another rank holds the same and writes it)."""

    def view(self, tensor: Tensor) -> Tensor:
        """The run's elements in `tensor`, which is laid out as `self.tensor`."""
        return tensor.detach().view(-1)[self.offset : self.offset + self.numel]


class ShardedState(ABC):
    """The fp32 state of training (weights, EMA, moments, state buffers), of which each rank holds pieces."""

    optimizer: AdamWEMA

    @abstractmethod
    def pieces(self) -> list[Piece]:
        """Where this rank's fp32 state lies."""

    @abstractmethod
    def shapes(self) -> dict[str, list[int]]:
        """The shape of every parameter and state buffer by name, whole even where ZeRO shards it."""

    @property
    @abstractmethod
    def constants(self) -> Mapping[str, Tensor]:
        """Buffers that are never trained (position tables), fp32 on the CPU, by name: readers of the weights need them."""

    @abstractmethod
    def publish_weights(self) -> None:
        """After the fp32 state was written to: bring the model's weights on all ranks up to date with it."""
