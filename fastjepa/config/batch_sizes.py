"""Shares the global batch of an optimizer step out over ranks and micro batches."""

from __future__ import annotations

from dataclasses import dataclass

from fastjepa.config import Config
from fastjepa.errors import ConfigError


@dataclass(frozen=True)
class BatchSizes:
    micro: int
    """Images per rank at a time."""
    accum: int
    """Micro batches per optimizer step."""

    @staticmethod
    def share(config: Config, world_size: int) -> BatchSizes:
        """
        Raises:
            ConfigError: the global batch cannot be divided by the ranks and the micro batch.
        """
        total, micro = config.global_batch_size, config.micro_batch_size
        if total % world_size:
            below, above = total // world_size * world_size, -(-total // world_size) * world_size
            fitting = max(n for n in range(1, world_size) if total % n == 0)
            raise ConfigError(
                f"global_batch_size = {total}: expected a multiple of the number of ranks, {world_size}, such as "
                f"{f'{below} or {above}' if below else above}; or start {fitting} ranks"
            )
        per_rank = total // world_size
        micro = per_rank if micro is None else min(micro, per_rank)
        if per_rank % micro:
            raise ConfigError(
                f"micro_batch_size = {micro}: expected a divisor of {per_rank}, each rank's share of "
                f"global_batch_size = {total} on {world_size} ranks, such as "
                f"{max(n for n in range(1, micro) if per_rank % n == 0)}"
            )
        return BatchSizes(micro, per_rank // micro)
