"""Where the step is carried out: plain PyTorch, or DeepSpeed ZeRO (which no other file knows) behind the same interface.

Both hold the model, the optimizer and this rank's part of the fp32 state (weights, moments, EMA), and say where each
parameter's elements lie in it (`pieces`), so that a checkpoint is written and read alike, whoever trained.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import logging
import os
import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

import fastjepa_kernels
from fastjepa import distributed
from fastjepa.batch_sizes import BatchSizes
from fastjepa.compilation import compile_blocks, compiles_blocks
from fastjepa.config import Config
from fastjepa.cuda_graphs import GraphedPasses
from fastjepa.ds_config import ZERO_SUB_GROUP_SIZE, read_ds_config
from fastjepa.errors import ConfigError
from fastjepa.masks import MaskBatch
from fastjepa.models.fp8 import check_fp8, use_fp8
from fastjepa.objective import IJEPA
from fastjepa.optim import AdamWEMA, flatten_groups, param_groups
from fastjepa.slices import SlicedPasses
from fastjepa.zero_gather import WeightGather


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


class DeepSpeedEngine(Engine):
    """DeepSpeed ZeRO, stages 0 to 3. The target encoder is a parameter group like the others (fastjepa.optim)."""

    def __init__(
        self, model: IJEPA, config: Config, sizes: BatchSizes, device: torch.device, ds_config: str | Path
    ) -> None:
        super().__init__(model, device)
        precision = resolve_precision(config, device)
        settings = read_ds_config(ds_config, config, sizes, distributed.world_size(), bf16=precision == torch.bfloat16)
        self._stage: int = settings["zero_optimization"]["stage"]
        if compiles_blocks(config, device, precision, self._stage):
            compile_blocks(model, may_give_up=config.compile == "auto")
        groups = param_groups(model)
        self._names = {p: name for group in groups for name, p in zip(group["names"], group["params"], strict=True)}
        self._params = {group["name"]: list(group["params"]) for group in groups}
        self._shapes = {name: list(p.shape) for p, name in self._names.items()}
        if self._stage == 0:
            model.target_encoder.requires_grad_(False)  # else its missing gradients are sent around as zeros
        bf16: bool = settings["bf16"]["enabled"]
        model.autocast = precision == torch.bfloat16 and not bf16
        exact = {name: p.detach().clone() for p, name in self._names.items()} if bf16 else {}
        self.optimizer = AdamWEMA(groups, config.optim)
        if bf16:
            model.bfloat16()  # DeepSpeed would leave the positions in fp32, and with them all tokens
        self._engine = _initialize(model, self.optimizer, settings, ds_config)
        self.optimizer.bind(self._state_tensors(), self._norm_of_this_step)
        modules = {"encoder": model.context_encoder, "predictor": model.predictor, "target": model.target_encoder}
        parts = [modules[name.split("_")[0]] for name in self._params]
        self._gather = WeightGather(self._engine.optimizer, parts) if self._stage in (1, 2) else None
        if self._gather:
            _order_on_the_device(self._engine.optimizer)
        if bf16:  # the fp32 state was made from weights already rounded to bf16
            for piece in self.pieces():
                piece.view(piece.tensor).copy_(exact[piece.name].view(-1)[piece.start : piece.start + piece.numel])
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

    def micro_step(self, images: Tensor, masks: MaskBatch) -> Tensor:
        loss: Tensor = self._engine(images, masks)
        with record_function("backward"):
            self._engine.backward(_spoil_gradients_if_not_finite(loss))
        is_last = self._engine.is_gradient_accumulation_boundary()
        if is_last and self._stage < 3:
            self._grad_norm = self._norm_of_gradients()
        gathers = self._gather.launched_by_step() if self._gather and is_last else nullcontext()
        with record_function("optimizer"), gathers:
            self._engine.step()
        if is_last:
            self._grad_norm = self._norm_of_this_step()
            self._count_skipped()
        return loss.detach()

    @property
    def model(self) -> IJEPA:
        if self._gather:
            self._gather.wait()
        return self._model

    @torch.no_grad()
    def _norm_of_gradients(self) -> Tensor:
        """Of the reduced gradients. DeepSpeed's own norm is read back from the device, once per parameter group."""
        if self._stage == 0:
            return _norm([p.grad for p in self._model.trained_parameters() if p.grad is not None])
        shards = self._engine.optimizer.averaged_gradients
        trained = [index for index, group in enumerate(self.param_groups) if not group["ema_of"]]
        square = _norm([grad for index in trained for grad in shards[index]]).square()
        dist.all_reduce(square)
        return square.sqrt()

    def _norm_of_this_step(self) -> Tensor:
        """Stage 3 knows it before it steps the optimizer: infinite, and the optimizer left alone, if it is not finite."""
        norm = self._engine.optimizer._global_grad_norm if self._stage == 3 else self._grad_norm
        return norm if isinstance(norm, Tensor) else torch.full_like(self._grad_norm, norm)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = self._engine.optimizer.param_groups
        return groups

    def pieces(self) -> list[Piece]:
        pieces = []
        rank = distributed.rank()
        for name, tensors in self._state_tensors().items():
            offset = 0
            for index, param in enumerate(self._params[name]):
                if self._stage == 0:
                    pieces.append(Piece(self._names[param], 0, param.numel(), tensors[index], 0))
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

    def parameter_shapes(self) -> dict[str, list[int]]:
        return self._shapes

    @property
    def writes_state(self) -> bool:
        return self._stage > 0 or distributed.rank() == 0

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
        # At stage 3 DeepSpeed never lets go: the model stays on its list of the modules that compute, and methods that
        # cache their results hold what they were called on.
        stack = getattr(sys.modules.get("deepspeed.runtime.zero.parameter_offload"), "FWD_MODULE_STACK", [])
        stack[:] = [module for module in stack if module is not self._model]
        for cached in gc.get_objects():
            if type(cached) is functools._lru_cache_wrapper and cached.__module__.startswith("deepspeed."):
                cached.cache_clear()


def _norm(grads: list[Tensor]) -> Tensor:
    """In fp32, of all elements together."""
    return torch.stack(torch._foreach_norm(grads, 2, dtype=torch.float32)).norm()


def _order_on_the_device(zero: Any) -> None:
    """With overlap_comm, ZeRO 1 and 2 end a backward pass by waiting until the whole GPU is idle. But all that comes next on
    the current stream needs is the reduced gradients: so let that stream wait for the reductions, not the host."""
    accelerator = sys.modules[type(zero).__module__].get_accelerator()
    epilogue = zero.independent_gradient_partition_epilogue

    def without_the_host() -> None:
        accelerator.synchronize = lambda: accelerator.current_stream().wait_stream(zero.reduction_stream)
        try:
            epilogue()
        finally:
            del accelerator.synchronize

    zero.independent_gradient_partition_epilogue = without_the_host


def _initialize(model: IJEPA, optimizer: AdamWEMA, settings: dict[str, Any], path: str | Path) -> Any:
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    import deepspeed.ops
    from pydantic import ValidationError

    if not torch.cuda.is_available():
        # Else the first run compiles an extension for a minute without a word, and hangs on its lock if interrupted.
        compatible = getattr(deepspeed.ops, "__compatible_ops__", None)
        if isinstance(compatible, dict) and "deepspeed_shm_comm" in compatible:
            compatible["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel(logging.WARNING)
    # Two warnings that are not for the user: about an optimizer that it was not tested with, and about its own calls.
    deepspeed.utils.logger.addFilter(lambda record: "untested optimizer" not in record.getMessage())
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning, "torch.distributed")
    distributed.init_single_process_group()
    # Not always LOCAL_RANK: SLURM may show each rank only its own GPU. ZeRO 3 takes the variable for the GPU's number, and
    # DeepSpeed asks for it even where a single process runs without a launcher.
    gpu = torch.cuda.current_device() if torch.cuda.is_available() else 0
    args = argparse.Namespace(device_rank=gpu)
    local_rank = os.environ.get("LOCAL_RANK", "0")
    os.environ["LOCAL_RANK"] = str(gpu)
    try:
        engine, *_ = deepspeed.initialize(args, model=model, optimizer=optimizer, config=settings)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))} = {e['input']!r}: {e['msg']}" for e in error.errors())
        raise ConfigError(f"{path}: {error.title}: {problems}") from error
    finally:
        os.environ["LOCAL_RANK"] = local_rank
    return engine


def _choose_kernels(config: Config, device: torch.device) -> None:
    """Before the first step, so that an implementation that cannot run is a mistake in the settings, not a crash.

    Raises:
        ConfigError: one that was asked for cannot run here; the message lists those that can.
    """
    size, predictor_width = config.model.size, config.model.predictor_embed_dim
    head_dims = {size.embed_dim // size.num_heads, predictor_width // size.num_heads}
    dtype = resolve_precision(config, device)
    try:
        fastjepa_kernels.request(dataclasses.asdict(config.kernels))
        for operation in ("masked_gather", "target_loss", "linear"):
            fastjepa_kernels.choose(operation, device.type, dtype)
        for head_dim in sorted(head_dims):
            fastjepa_kernels.choose("block_attention", device.type, dtype, head_dim)
        fastjepa_kernels.choose("adamw_ema", device.type, torch.float32)
        fastjepa_kernels.choose("mask_sampling", device.type, torch.int64)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def build_engine(
    model: IJEPA, config: Config, sizes: BatchSizes, device: torch.device, ds_config: str | Path | None
) -> Engine:
    with distributed.together():
        _choose_kernels(config, device)
        if config.target_precision == "fp8":
            check_fp8(config, device, resolve_precision(config, device))
            use_fp8(model.target_encoder)
    if ds_config is None:
        engine: Engine = TorchEngine(model, config, sizes, device)
    else:
        engine = DeepSpeedEngine(model, config, sizes, device, ds_config)
    distributed.be_patient(config.hang_timeout)  # DeepSpeed made groups of its own
    return engine
