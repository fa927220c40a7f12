"""The step with plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from fastjepa import distributed
from fastjepa.config import Config
from fastjepa.config.batch_sizes import BatchSizes
from fastjepa.engine.base import Engine, Piece, _norm, _spoil_gradients_if_not_finite, resolve_precision
from fastjepa.engine.compilation import compile_blocks, compiles_blocks
from fastjepa.engine.cuda_graphs import GraphedPasses
from fastjepa.engine.slices import SlicedPasses
from fastjepa.objectives.ijepa.masks import MaskBatch
from fastjepa.objectives.ijepa.objective import IJEPA
from fastjepa.optim.adamw_ema import AdamWEMA
from fastjepa.optim.groups import flatten_groups, param_groups


class TorchEngine(Engine):
    """Plain PyTorch: fp32 weights, bf16 by autocast, gradients averaged over the ranks in one all-reduce per group."""

    def __init__(self, model: IJEPA, config: Config, sizes: BatchSizes, device: torch.device) -> None:
        super().__init__(model.to(device), device)
        self._sizes = sizes
        precision = resolve_precision(config, device)
        model.autocast = precision == torch.bfloat16
        if compiles_blocks(config, device, precision, None):
            compile_blocks(model, may_give_up=config.compile == "auto")
        self._passes: Callable[[Tensor, MaskBatch], Tensor] = self._forward_and_backward
        if config.compile == "cuda_graphs":
            self._passes = GraphedPasses(self._forward_and_backward)
        elif device.type == "cpu":
            self._passes = SlicedPasses(self._forward_and_backward, config, bf16=model.autocast)
        groups = param_groups(model)
        params = {n: p for group in groups for n, p in zip(group["names"], group["params"], strict=True)}
        self._shapes = {name: list(p.shape) for name, p in params.items()}
        flatten_groups(groups)
        self.optimizer = AdamWEMA(groups, config.optim)
        self.optimizer.bind({group["name"]: group["params"] for group in groups}, lambda: self._grad_norm)
        self._pieces = [
            Piece(name, 0, params[name].numel(), group["params"][0], params[name].storage_offset())
            for group in groups
            for name in group["names"]
        ]
        self._grads: list[Tensor] = [group["params"][0].grad for group in groups if not group["ema_of"]]
        self._micro_steps = 0

    def micro_step(self, images: Tensor, masks: MaskBatch) -> Tensor:
        loss = self._passes(images, masks)
        self._micro_steps += 1
        if self._micro_steps % self._sizes.accum == 0:
            with record_function("optimizer"):
                self._optimizer_step()
        return loss

    def _forward_and_backward(self, images: Tensor, masks: MaskBatch, share: float = 1.0) -> Tensor:
        """The mean loss of some images that make up a `share` of the micro batch."""
        loss: Tensor = self._model(images, masks)
        with record_function("backward"):
            (_spoil_gradients_if_not_finite(loss) * (share / self._sizes.accum)).backward()
        return loss.detach()

    @torch.no_grad()
    def _optimizer_step(self) -> None:
        world = distributed.world_size()
        if world > 1:
            with record_function("waiting for gradients"):
                for work in [dist.all_reduce(grad, async_op=True) for grad in self._grads]:
                    work.wait()
            torch._foreach_div_(self._grads, world)
        self._grad_norm = _norm(self._grads)
        self.optimizer.step()
        torch._foreach_zero_(self._grads)
        self._count_skipped()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    def pieces(self) -> list[Piece]:
        return self._pieces

    def parameter_shapes(self) -> dict[str, list[int]]:
        return self._shapes

    @property
    def writes_state(self) -> bool:
        return distributed.rank() == 0

    def publish_weights(self) -> None:
        pass  # the model's weights are views of the state

    def close(self) -> None:
        pass  # nothing else refers to it
