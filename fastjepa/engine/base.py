"""Where the step is carried out: plain PyTorch, or DeepSpeed ZeRO (which no other file knows) behind the same interface.

Both hold the model, the optimizer and this rank's part of the fp32 state (weights, moments, EMA), and say where each
parameter's elements lie in it (`pieces`), so that a checkpoint is written and read alike, whoever trained.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastjepa.config import Config
from fastjepa.objectives.ijepa.masks import MaskBatch
from fastjepa.objectives.ijepa.objective import IJEPA
from fastjepa.optim.adamw_ema import AdamWEMA


@dataclass(frozen=True)
class Piece:
    """A run of a parameter's elements within an fp32 tensor that the optimizer holds on this rank."""

    name: str
    start: int
    """First element, in the flattened parameter."""
    numel: int
    tensor: Tensor
    """The optimizer's parameter: weights (of the target groups: the EMA); its moments lie alike in optimizer.state."""
    offset: int
    """First element, in the flattened tensor."""

    def view(self, tensor: Tensor) -> Tensor:
        """The run's elements in `tensor`, which is laid out as `self.tensor`."""
        return tensor.detach().view(-1)[self.offset : self.offset + self.numel]


class Engine(ABC):
    """One micro batch in, and after the last one of a step an optimizer step with EMA."""

    optimizer: AdamWEMA
    device: torch.device

    def __init__(self, model: IJEPA, device: torch.device) -> None:
        self._model, self.device = model, device
        self._grad_norm = torch.zeros((), device=device)
        self._skipped_in_a_row = torch.zeros((), dtype=torch.int64, device=device)

    @property
    def model(self) -> IJEPA:
        """With the weights of the last step: ask again after each, if you read parameters and do not only compute."""
        return self._model

    @abstractmethod
    def micro_step(self, images: Tensor, masks: MaskBatch) -> Tensor:
        """Forward, backward, and after `grad_accum_steps` calls the optimizer step. Returns the loss, not read back.

        A step with a loss or a gradient that is not finite, on whichever rank, changes nothing on any.
        """

    def grad_norm(self) -> float:
        """Global gradient norm of the last optimizer step, before clipping. Reads it back from the device."""
        return self._grad_norm.item()

    def skipped_in_a_row(self) -> Tensor:
        """How many of the last optimizer steps, up to now, changed nothing: int64 [], not read back."""
        return self._skipped_in_a_row.clone()

    def _count_skipped(self) -> None:
        """After an optimizer step, whose gradient norm is known."""
        self._skipped_in_a_row.add_(1).mul_(~self._grad_norm.isfinite())

    @property
    @abstractmethod
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups, for the schedule to write into."""

    @abstractmethod
    def pieces(self) -> list[Piece]:
        """Where this rank's fp32 state lies."""

    @abstractmethod
    def parameter_shapes(self) -> dict[str, list[int]]:
        """Shape of every parameter by name, the target encoder's included, whole even where ZeRO shards it."""

    @property
    @abstractmethod
    def writes_state(self) -> bool:
        """Whether this rank's pieces belong into a checkpoint (False: another rank holds the same)."""

    @abstractmethod
    def publish_weights(self) -> None:
        """After the fp32 state was written to: bring the model's weights on all ranks up to date with it."""

    @abstractmethod
    def close(self) -> None:
        """The last call, by all ranks. After it `del` of engine and model and `gc.collect()` free their memory."""


def _spoil_gradients_if_not_finite(loss: Tensor) -> Tensor:
    """The loss, whose gradients are all NaN if it is not finite itself, and unchanged to the last bit otherwise.

    The gradients travel to all ranks anyway: so all learn of it without a message.
    """
    return loss * (1 + 0 * loss.detach())


def resolve_precision(config: Config, device: torch.device) -> torch.dtype:
    if config.precision == "auto":
        # Older GPUs only emulate bf16.
        fast = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if fast else torch.float32
    return torch.bfloat16 if config.precision == "bf16" else torch.float32


def _norm(grads: list[Tensor]) -> Tensor:
    """In fp32, of all elements together."""
    return torch.stack(torch._foreach_norm(grads, 2, dtype=torch.float32)).norm()
