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
