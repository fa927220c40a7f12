"""The step with DeepSpeed ZeRO, stages 0 to 3."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from fastjepa import distributed
from fastjepa.config import Config
from fastjepa.config.batch_sizes import BatchSizes
from fastjepa.engine import deepspeed_patches
from fastjepa.engine.base import Engine, detached, norm_of, resolve_precision, spoil_gradients_if_not_finite
from fastjepa.engine.compilation import compile_blocks, compiles_blocks
from fastjepa.engine.ds_config import ZERO_SUB_GROUP_SIZE, read_ds_config
from fastjepa.engine.zero_gather import WeightGather
from fastjepa.errors import ConfigError
from fastjepa.objectives.base import Method, Objective, Output, Prepared
from fastjepa.optim.adamw_ema import AdamWEMA
from fastjepa.optim.groups import param_groups
from fastjepa.optim.sharded_state import Piece


class DeepSpeedEngine(Engine):
    """DeepSpeed ZeRO, stages 0 to 3. A part that averages another is a parameter group like the others (fastjepa.optim)."""

    def __init__(
        self,
        model: Objective,
        method: Method,
        config: Config,
        sizes: BatchSizes,
        device: torch.device,
        ds_config: str | Path,
    ) -> None:
        super().__init__(model, device)
        precision = resolve_precision(config, device)
        settings = read_ds_config(ds_config, config, sizes, distributed.world_size(), bf16=precision == torch.bfloat16)
        self._accum = sizes.accum
        self._stage: int = settings["zero_optimization"]["stage"]
        if compiles_blocks(config, method.operations(precision), device, self._stage):
            compile_blocks(model, may_give_up=config.compile == "auto")
        groups = param_groups(model.parts)
        self._names = {p: name for group in groups for name, p in zip(group["names"], group["params"], strict=True)}
        self._params = {group["name"]: list(group["params"]) for group in groups}
        modules = [model.part(group["part"]) for group in groups]
        if self._stage == 0:
            for part in model.parts:
                if part.averages:  # else its missing gradients are sent around as zeros
                    part.module.requires_grad_(False)
        bf16: bool = settings["bf16"]["enabled"]
        self._autocast = torch.bfloat16 if precision == torch.bfloat16 and not bf16 else None
        exact = {name: p.detach().clone() for p, name in self._names.items()} if bf16 else {}
        self._shapes = {name: list(p.shape) for p, name in self._names.items()}
        self._shapes |= {name: list(buffer.shape) for name, buffer in model.state().items()}
        self.optimizer = AdamWEMA(groups, config.optim)
        if bf16:
            _cast_to_bf16(model)
        self._engine = deepspeed_patches.initialize(model, self.optimizer, settings, ds_config)
        self.optimizer.bind(self._state_tensors(), self._norm_of_this_step)
        self._gather = WeightGather(self._engine.optimizer, modules) if self._stage in (1, 2) else None
        if self._gather:
            deepspeed_patches.wait_on_the_device(self._engine.optimizer)
        if bf16:  # the fp32 state was made from weights already rounded to bf16
            for piece in self.pieces():
                if piece.name in exact:
                    whole = exact[piece.name].view(-1)
                    piece.view(piece.tensor).copy_(whole[piece.start : piece.start + piece.numel])
            self.publish_weights()

    def _state_tensors(self) -> dict[str, list[Tensor]]:
        """Group name -> the fp32 tensors that DeepSpeed steps it with on this rank."""
        if self._stage < 3:
            return {group["name"]: list(group["params"]) for group in self.param_groups}
        zero, names = self._engine.optimizer, [group["name"] for group in self.param_groups]
        tensors: dict[str, list[Tensor]] = {name: [] for name in names}
        for sub_group, flat in enumerate(zero.fp32_partitioned_groups_flat):
            tensors[names[zero.sub_group_to_group_id[sub_group]]].append(flat)
        if any(len(flats) != 1 for flats in tensors.values()):
            raise ConfigError(
                f"zero_optimization.sub_group_size splits a parameter group: remove the key (default {ZERO_SUB_GROUP_SIZE})"
            )
        return tensors

    def micro_step(self, batch: Prepared) -> Output:
        output: Output = self._engine(batch, self._autocast)
        self._add_statistics(output.statistics, 1 / self._accum)
        with record_function("backward"):
            self._engine.backward(spoil_gradients_if_not_finite(output.loss))
        is_last = self._engine.is_gradient_accumulation_boundary()
        if is_last and self._stage < 3:
            self._grad_norm = self._norm_of_gradients()
        gathers = self._gather.launched_by_step() if self._gather and is_last else nullcontext()
        with record_function("optimizer"), gathers:
            self._engine.step()
        if is_last:
            self._grad_norm = self._norm_of_this_step()
            self._end_step()
        return detached(output)

    @property
    def model(self) -> Objective:
        if self._gather:
            self._gather.wait()
        return self._model

    @torch.no_grad()
    def _norm_of_gradients(self) -> Tensor:
        """The norm of the reduced gradients. DeepSpeed's own is read back from the device, once per parameter group."""
        if self._stage == 0:
            return norm_of([p.grad for p in self._model.trained_parameters() if p.grad is not None])
        shards = self._engine.optimizer.averaged_gradients
        trained = [index for index, group in enumerate(self.param_groups) if not group["ema_of"]]
        square = norm_of([grad for index in trained for grad in shards[index]]).square()
        dist.all_reduce(square)
        return square.sqrt()

    def _norm_of_this_step(self) -> Tensor:
        """The norm of all gradients. Stage 3 knows it before it steps the optimizer; if it is not finite, stage 3 calls it
        infinite and does not step."""
        norm = self._engine.optimizer._global_grad_norm if self._stage == 3 else self._grad_norm
        return norm if isinstance(norm, Tensor) else torch.full_like(self._grad_norm, norm)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = self._engine.optimizer.param_groups
        return groups

    def pieces(self) -> list[Piece]:
        rank = distributed.rank()
        pieces = self._state_pieces(written=rank == 0)
        for name, tensors in self._state_tensors().items():
            offset = 0
            for index, param in enumerate(self._params[name]):
                if self._stage == 0:
                    pieces.append(Piece(self._names[param], 0, param.numel(), tensors[index], 0, written=rank == 0))
                elif self._stage == 3:
                    # Every rank holds the same share of each parameter, one behind the other; the last may be padded.
                    share = param.ds_tensor.numel()
                    start = rank * share
                    pieces.append(
                        Piece(self._names[param], start, min(share, param.ds_numel - start), tensors[0], offset)
                    )
                    offset += share
                else:
                    # The group is one flat buffer of which each rank holds an equal share: cut the parameter to ours.
                    first = param.storage_offset()
                    low, high = rank * tensors[0].numel(), (rank + 1) * tensors[0].numel()
                    start, stop = max(first, low), min(first + param.numel(), high)
                    pieces.append(Piece(self._names[param], start - first, stop - start, tensors[0], start - low))
        return [piece for piece in pieces if piece.numel > 0]

    def shapes(self) -> dict[str, list[int]]:
        return self._shapes

    @torch.no_grad()
    def publish_weights(self) -> None:
        zero = self._engine.optimizer
        if self._gather:
            self._gather.wait()
            zero.update_lp_params()
        elif self._stage == 3:
            zero.checkpoint_event_prologue()  # partitions the small parameters that are kept whole
            for sub_group in range(len(zero.fp32_partitioned_groups_flat)):
                zero._reassign_or_swap_out_partitioned_parameters(sub_group)
            zero.checkpoint_event_epilogue()  # and gathers them again

    def close(self) -> None:
        if self._gather:
            self._gather.wait()
        self._engine.destroy()
        deepspeed_patches.forget(self._model)


def _cast_to_bf16(model: Objective) -> None:
    """Cast parameters and buffers to bf16, but for the state buffers, which are fp32 by contract.

    DeepSpeed would leave all buffers in fp32: with the position tables all tokens would be fp32.
    """
    state = {id(buffer) for buffer in model.state().values()}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.bfloat16()
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point() and id(buffer) not in state:
                setattr(module, name, buffer.bfloat16())
