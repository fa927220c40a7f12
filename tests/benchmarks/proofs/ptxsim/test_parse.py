"""Unknown PTX is refused."""

from __future__ import annotations

import re

import pytest

from tests.support.handwritten_ptx import run


@pytest.mark.parametrize(
    "statement",
    [
        "frobnicate.b32 %r1, %r2;",
        "add.sat.s32 %r1, %r2, %r3;",
        "mov.u32 %r1, %clock;",
        "bar.sync 1, 64;",
        "ld.acquire.global.b32 %r1, [%rd1];",
        "cvt.rn.satfinite.e4m3x2.f32 %rs1, %r1, %r2;",
        "st.local.b32 [%rd1], %r1;",
    ],
)
def test_an_unknown_statement_is_refused_with_its_text(statement: str) -> None:
    with pytest.raises(NotImplementedError, match=re.escape(f"`{statement.rstrip(';')}`")):
        run(statement)
