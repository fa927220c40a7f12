"""The step with plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import record_function

from fastjepa import distributed
from fastjepa.config import Config
from fastjepa.config.batch_sizes import BatchSizes
from fastjepa.engine.base import Engine, detached, norm_of, resolve_precision, spoil_gradients_if_not_finite
from fastjepa.engine.compilation import compile_blocks, compiles_blocks
from fastjepa.engine.cuda_graphs import GraphedPasses
from fastjepa.engine.slices import SlicedPasses
from fastjepa.models.layers import Linear
from fastjepa.objectives.base import Method, Objective, Output, Prepared
from fastjepa.optim.adamw_ema import AdamWEMA
from fastjepa.optim.groups import flatten_groups, param_groups
from fastjepa.optim.sharded_state import Piece
from fastjepa_kernels import Operation


class TorchEngine(Engine):
    """Plain PyTorch: fp32 weights, bf16 by autocast, gradients averaged over the ranks in one all-reduce per group."""

    def __init__(
        self, model: Objective, method: Method, config: Config, sizes: BatchSizes, device: torch.device
    ) -> None:
        super().__init__(model.to(device), device)
        self._sizes = sizes
        precision = resolve_precision(config, device)
        self._autocast = precision if precision == torch.bfloat16 else None
        compiled = compiles_blocks(config, method.operations(precision), device, None)
        if compiled:
            compile_blocks(model, may_give_up=config.compile == "auto")
        self._passes: Callable[[Prepared], Output] = self._forward_and_backward
        if config.compile == "cuda_graphs":
            self._passes = GraphedPasses(self._forward_and_backward)
        elif device.type == "cpu":
            self._passes = SlicedPasses(self._forward_and_backward, method, bf16=self._autocast is not None)
        groups = param_groups(model.parts)
        params = {n: p for group in groups for n, p in zip(group["names"], group["params"], strict=True)}
        flatten_groups(groups)
        if not compiled and Operation("linear", precision).choose(device.type) == "onednn":
            _add_gradients_within_products(model)
        self.optimizer = AdamWEMA(groups, config.optim)
        self.optimizer.bind({group["name"]: group["params"] for group in groups}, lambda: self._grad_norm)
        self._shapes = {n: list(x.shape) for n, x in (*params.items(), *model.state().items())}
        first = distributed.rank() == 0  # which writes the state: all ranks hold the same
        self._pieces = [
            Piece(name, 0, params[name].numel(), group["params"][0], params[name].storage_offset(), first)
            for group in groups
            for name in group["names"]
        ] + self._state_pieces(written=first)
        self._grads = [group["params"][0].grad for group in groups if not group["ema_of"]]
        self._micro_steps = 0

    def micro_step(self, batch: Prepared) -> Output:
        output = self._passes(batch)
        self._add_statistics(output.statistics, 1 / self._sizes.accum)
        self._micro_steps += 1
        if self._micro_steps % self._sizes.accum == 0:
            with record_function("optimizer"):
                self._optimizer_step()
        return output

    def _forward_and_backward(self, batch: Prepared, share: float = 1.0) -> Output:
        """Loss and signals of some images that make up a `share` of the micro batch."""
        output: Output = self._model(batch, self._autocast)
        with record_function("backward"):
            (spoil_gradients_if_not_finite(output.loss) * (share / self._sizes.accum)).backward()
        return detached(output)

    @torch.no_grad()
    def _optimizer_step(self) -> None:
        world = distributed.world_size()
        if world > 1:
            with record_function("waiting for gradients"):
                for work in [dist.all_reduce(grad, async_op=True) for grad in self._grads]:
                    work.wait()
            torch._foreach_div_(self._grads, world)
        self._grad_norm = norm_of(self._grads)
        self.optimizer.step()
        torch._foreach_zero_(self._grads)
        self._end_step()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    def pieces(self) -> list[Piece]:
        return self._pieces

    def shapes(self) -> dict[str, list[int]]:
        return self._shapes

    def publish_weights(self) -> None:
        pass  # the model's weights are views of the state

    def close(self) -> None:
        pass  # nothing else refers to it


def _add_gradients_within_products(model: Objective) -> None:
    """Have each linear layer's backward add the gradient of its weight to the flat buffer in the product itself."""
    for module in model.modules():
        if isinstance(module, Linear) and module.weight.grad is not None:
            module.compute_with(weight_grad=module.weight.grad)
