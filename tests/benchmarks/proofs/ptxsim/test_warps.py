"""Shuffles, votes and reductions within a warp."""

from __future__ import annotations

import numpy as np
import pytest

from tests.support.handwritten_ptx import by_lane, integers


@pytest.mark.parametrize("width", [32, 8])
@pytest.mark.parametrize(("mode", "by"), [("bfly", 5), ("up", 3), ("down", 3), ("idx", 6)])
def test_shuffles_stay_within_their_segment(mode: str, by: int, width: int) -> None:
    x = integers("u4", 0)
    clamp = (32 - width) << 8 | (0 if mode == "up" else 31)
    expected = x.copy()
    for lane in range(64):
        within, start = lane % width, lane // width * width
        partner = {"bfly": within ^ by, "up": within - by, "down": within + by, "idx": by}[mode]
        if 0 <= partner < width:
            expected[lane] = x[start + partner]
    np.testing.assert_array_equal(by_lane(f"shfl.sync.{mode}.b32 $d, $0, {by}, {clamp}, -1;", [x], "u4"), expected)


def test_votes_and_reductions_are_of_a_warp() -> None:
    x = integers("u4", 3)
    warps = x.reshape(2, 32)
    body = "setp.gt.u32 %p1, $0, 1000; vote.sync.ballot.b32 $d, %p1, -1;"
    ballots = [sum(int(v > 1000) << i for i, v in enumerate(warp)) for warp in warps]
    np.testing.assert_array_equal(by_lane(body, [x], "u4"), np.repeat(ballots, 32))
    for name, fn in (("add", np.add), ("max", np.maximum), ("or", np.bitwise_or)):
        result = by_lane(f"redux.sync.{name}.u32 $d, $0, -1;", [x], "u4")
        np.testing.assert_array_equal(result, np.repeat(fn.reduce(warps, axis=1).astype("u4"), 32))
