"""The interface of engines: how a micro batch is trained on, whoever carries it out.

An engine holds the objective, the optimizer and this rank's part of the fp32 state, which it offers to checkpoints as a
`ShardedState`, so that a checkpoint is written and read alike, whoever trained.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastjepa import distributed
from fastjepa.config import Config
from fastjepa.objectives.base import Objective, Output, Prepared
from fastjepa.optim.sharded_state import Piece, ShardedState


class Engine(ShardedState):
    """One micro batch in, and after the last one of a step an optimizer step with EMA."""

    device: torch.device

    def __init__(self, model: Objective, device: torch.device) -> None:
        self._model, self.device = model, device
        self._constants = _constants_of(model)  # now: an engine may cast the model's
        self._statistics: dict[str, Tensor] = {}
        self._grad_norm = torch.zeros((), device=device)
        self._skipped_in_a_row = torch.zeros((), dtype=torch.int64, device=device)

    @property
    def model(self) -> Objective:
        """The objective with the weights of the last step. Ask again after each step before you read parameters."""
        return self._model

    @abstractmethod
    def micro_step(self, batch: Prepared) -> Output:
        """Forward, backward, and after `grad_accum_steps` calls the optimizer step.

        A step with a loss or a gradient that is not finite, on whichever rank, changes nothing on any.

        Returns:
            Loss and signals, detached and not read back.
        """

    def grad_norm(self) -> float:
        """Global gradient norm of the last optimizer step, before clipping. Reads it back from the device."""
        return self._grad_norm.item()

    def skipped_in_a_row(self) -> Tensor:
        """The number of optimizer steps in a row, up to now, that changed nothing: int64 [], not read back."""
        return self._skipped_in_a_row.clone()

    def _add_statistics(self, statistics: Mapping[str, Tensor], share: float) -> None:
        """Add those of a micro batch that is a `share` of the step."""
        for name, value in statistics.items():
            self._statistics[name] = self._statistics.get(name, 0) + share * value.float()

    @torch.no_grad()
    def _end_step(self) -> None:
        """What follows an optimizer step, when its gradient norm is known."""
        trained = self._grad_norm.isfinite()
        self._skipped_in_a_row.add_(1).mul_(~trained)
        if self._statistics:
            values = list(self._statistics.values())
            flat = torch.cat([value.reshape(-1) for value in values])
            if (world := distributed.world_size()) > 1:
                dist.all_reduce(flat)
                flat /= world
            means = [mean.view_as(v) for mean, v in zip(flat.split([v.numel() for v in values]), values, strict=True)]
            state = self._model.state()
            before = {name: buffer.clone() for name, buffer in state.items()}
            self._model.update_state(dict(zip(self._statistics, means, strict=True)))
            for name, buffer in state.items():
                buffer.copy_(torch.where(trained, buffer, before[name]))
            self._statistics = {}

    def _state_pieces(self, *, written: bool) -> list[Piece]:
        """The state buffers of the objective, which all ranks hold whole."""
        state = self._model.state()
        return [Piece(name, 0, buffer.numel(), buffer, 0, written) for name, buffer in state.items()]

    def constants(self) -> Mapping[str, Tensor]:
        buffers = dict(self._model.named_buffers())
        for name, constant in self._constants.items():
            if not torch.equal(buffers[name].cpu(), constant.to(buffers[name].dtype)):
                raise TypeError(f"buffer {name} has changed in training: expected it in state(), or persistent=False")
        return self._constants

    @property
    @abstractmethod
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups, for the schedule to write into."""

    @abstractmethod
    def close(self) -> None:
        """The last call, by all ranks. After it `del` of engine and model and `gc.collect()` free their memory."""


def _constants_of(model: Objective) -> dict[str, Tensor]:
    """The persistent buffers of the model that are not trained, fp32 on the CPU."""
    trained = {*dict(model.named_parameters(remove_duplicate=False)), *model.state()}
    return {
        name: tensor.detach().to("cpu", torch.float32, copy=True)
        for name, tensor in model.state_dict().items()
        if name not in trained
    }


def detached(output: Output) -> Output:
    """The output of a forward pass, without its graph."""
    return output._replace(loss=output.loss.detach())


def spoil_gradients_if_not_finite(loss: Tensor) -> Tensor:
    """The loss, whose gradients are all NaN if it is not finite itself, and unchanged to the last bit otherwise.

    The gradients travel to all ranks anyway, so all ranks learn of it without a message.
    """
    return loss * (1 + 0 * loss.detach())


def norm_of(grads: list[Tensor]) -> Tensor:
    """The L2 norm of all elements together, in fp32."""
    return torch.stack(torch._foreach_norm(grads, 2, dtype=torch.float32)).norm()


def resolve_precision(config: Config, device: torch.device) -> torch.dtype:
    """The dtype that blocks compute in: bfloat16 or float32."""
    if config.precision == "auto":
        # Older GPUs only emulate bf16.
        fast = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if fast else torch.float32
    return torch.bfloat16 if config.precision == "bf16" else torch.float32
