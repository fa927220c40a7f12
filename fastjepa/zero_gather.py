"""After a step of ZeRO 1 or 2 the updated weights travel between the ranks while the next step computes.

DeepSpeed gathers all weights at the end of its step and waits for them. Here each parameter group is gathered by an
asynchronous collective, in the order of its use, and each part of the model waits for its own groups when it computes: the
target encoder's, which comes last, have the context encoder and the predictor to hide under. On CUDA the collective runs on
NCCL's stream, and `wait` makes the current stream wait for its event, not the host.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

_DEEPSPEEDS = "all_gather_dp_groups"
"""The function that DeepSpeed's step and update_lp_params call, in the namespace of the optimizer's module."""


class WeightGather:
    """Takes the place of DeepSpeed's gather within `launched_by_step`.

    If DeepSpeed does not call what is replaced, it has gathered the weights itself: the result is the same, and slower.

    Args:
        zero: DeepSpeed's optimizer of stage 1 or 2.
        parts: for each parameter group, in the optimizer's order, the module that its parameters belong to.
    """

    def __init__(self, zero: Any, parts: list[nn.Module]) -> None:
        self._namespace, self._parts = sys.modules[type(zero).__module__], parts
        self._pending: dict[nn.Module, list[dist.Work]] = {part: [] for part in parts}
        self._replaces = callable(getattr(self._namespace, _DEEPSPEEDS, None))
        if not self._replaces:
            logging.getLogger(__name__).warning(
                f"this DeepSpeed has no {_DEEPSPEEDS}: its step waits for the weights of the other ranks"
            )
        for part in self._pending:
            # All of them, whichever of them is called first: none can compute with old weights.
            for module in part.modules():
                module.register_forward_pre_hook(lambda *_, part=part: self._wait_for(part))

    @contextmanager
    def launched_by_step(self) -> Iterator[None]:
        """Around DeepSpeed's step: it returns when the gathers are under way."""
        self.wait()
        if not self._replaces:
            yield
            return
        original = getattr(self._namespace, _DEEPSPEEDS)
        setattr(self._namespace, _DEEPSPEEDS, self._launch)
        try:
            yield
        finally:
            setattr(self._namespace, _DEEPSPEEDS, original)

    def wait(self) -> None:
        """For all weights: before they are read other than by the modules' forward."""
        for part in self._pending:
            self._wait_for(part)

    def _launch(
        self,
        groups_flat: list[Tensor],
        partitioned_param_groups: list[list[Tensor]],
        dp_process_group: list[dist.ProcessGroup],
        **_: Any,
    ) -> None:
        for part, flat, shards, group in zip(
            self._parts, groups_flat, partitioned_param_groups, dp_process_group, strict=True
        ):
            if len(shards) > 1:
                mine = shards[dist.get_rank(group)]
                self._pending[part].append(dist.all_gather_into_tensor(flat, mine, group=group, async_op=True))

    def _wait_for(self, part: nn.Module) -> None:
        works = self._pending[part]
        while works:
            works[0].wait()
            del works[0]
