"""Gathers the weights that a step of ZeRO 1 or 2 updated while the next step computes.

DeepSpeed gathers all weights at the end of its step and waits for them. Here each parameter group is gathered by an
asynchronous collective, in the optimizer's order, and each part of the model waits for its own groups when it computes:
those of the predictor and of the target encoder hide under the context encoder. On CUDA the collective runs on NCCL's
stream, and `wait` makes the current stream wait for its event, not the host.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.profiler import record_function

from fastjepa.engine.deepspeed_patches import GATHER, gather_replaced_by
from fastjepa.models.layers import Block

logger = logging.getLogger(__name__)


class WeightGather:
    """Takes the place of DeepSpeed's gather within `launched_by_step`.

    If a version of DeepSpeed does not call the function that is replaced, it has gathered the weights itself: the result is
    the same, later, which is logged.

    Args:
        zero: DeepSpeed's optimizer of stage 1 or 2.
        parts: for each parameter group, in the optimizer's order, the module that its parameters belong to.
    """

    def __init__(self, zero: Any, parts: list[nn.Module]) -> None:
        self._zero, self._parts = zero, parts
        self._pending: dict[nn.Module, list[dist.Work]] = {part: [] for part in parts}
        self._launched = False
        for part in self._pending:
            for module in _called_from_outside(part):
                module.register_forward_pre_hook(lambda *_, part=part: self._wait_for(part))

    @contextmanager
    def launched_by_step(self) -> Iterator[None]:
        """Enter this around DeepSpeed's step, which then returns when the gathers are under way."""
        self.wait()
        with gather_replaced_by(self._launch, self._zero):
            yield
        if not self._launched and not self._zero.overflow:  # then the step was skipped
            self._launched = True
            logger.warning("DeepSpeed's step does not call %s: it waits for the weights of the other ranks", GATHER)

    def wait(self) -> None:
        """Wait for all weights. Call it before they are read other than by the modules' forward."""
        for part in self._pending:
            self._wait_for(part)

    def _launch(
        self,
        groups_flat: list[Tensor],
        partitioned_param_groups: list[list[Tensor]],
        dp_process_group: list[dist.ProcessGroup],
        **_: Any,
    ) -> None:
        self._launched = True
        for part, flat, shards, group in zip(
            self._parts, groups_flat, partitioned_param_groups, dp_process_group, strict=True
        ):
            if len(shards) > 1:
                mine = shards[dist.get_rank(group)]
                self._pending[part].append(dist.all_gather_single(flat, mine, group=group, async_op=True))

    def _wait_for(self, part: nn.Module) -> None:
        works = self._pending[part]
        if works:
            with record_function("waiting for weights"):
                while works:
                    works.pop(0).wait()


def _called_from_outside(part: nn.Module) -> list[nn.Module]:
    """All modules, whichever of them is called first: none can compute with old weights. But for those within a block, which
    it calls itself, and which may be compiled with it."""
    blocks = [module for module in part.modules() if isinstance(module, Block)]
    inner = {module for block in blocks for module in block.modules()} - {*blocks}
    return [module for module in part.modules() if module not in inner]
