"""A global batch is shared out among ranks and micro batches, or refused with sizes that can be."""

from __future__ import annotations

import pytest

from fastjepa.config.batch_sizes import BatchSizes
from fastjepa.errors import ConfigError
from tests.support.small import small_config


def test_a_batch_that_cannot_be_shared_out_names_sizes_that_can() -> None:
    with pytest.raises(ConfigError, match="multiple of the number of ranks, 6, such as 96 or 102; or start 5 ranks"):
        BatchSizes.share(small_config(global_batch_size=100), 6)
    with pytest.raises(ConfigError, match=r"divisor of 50, .* such as 10"):
        BatchSizes.share(small_config(global_batch_size=100, micro_batch_size=24), 2)


@pytest.mark.parametrize(
    ("total", "micro", "world", "expected"),
    [
        (12, None, 1, BatchSizes(12, 1)),
        (12, None, 3, BatchSizes(4, 1)),
        (12, 2, 2, BatchSizes(2, 3)),
        (12, 100, 2, BatchSizes(6, 1)),  # a micro batch is at most the rank's share
        (12, 1, 12, BatchSizes(1, 1)),
    ],
)
def test_the_global_batch_is_shared_out(total: int, micro: int | None, world: int, expected: BatchSizes) -> None:
    sizes = BatchSizes.share(small_config(global_batch_size=total, micro_batch_size=micro), world)
    assert sizes == expected
    assert sizes.micro * sizes.accum * world == total


def test_a_batch_that_the_ranks_cannot_share_is_refused() -> None:
    with pytest.raises(ConfigError, match="global_batch_size = 12: expected a multiple of the number of ranks, 5"):
        BatchSizes.share(small_config(global_batch_size=12), 5)


def test_a_micro_batch_that_does_not_divide_a_share_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"micro_batch_size = 4: expected a divisor of 6, .*12 on 2 ranks"):
        BatchSizes.share(small_config(global_batch_size=12, micro_batch_size=4), 2)
