"""The tally: images with the same bytes are grouped."""

import numpy as np
import numpy.typing as npt
import pytest

from fastjepa.data.check.tally import same_bytes


@pytest.mark.parametrize("n", [0, 1, 2, 50, 300])
def test_images_of_the_same_bytes_are_grouped_as_a_dictionary_would(n: int) -> None:
    rng = np.random.default_rng(n)
    digests: npt.NDArray[np.uint64] = rng.integers(0, 12, (n, 2)).astype(np.uint64)
    expected: dict[tuple[int, ...], list[int]] = {}
    for position, digest in enumerate(digests.tolist()):
        expected.setdefault(tuple(digest), []).append(position)
    order, starts, ends = same_bytes(digests)
    found = [order[start:end].tolist() for start, end in zip(starts, ends, strict=True)]
    assert found == [group for group in expected.values() if len(group) > 1]
    assert sorted(order) == list(range(n))
