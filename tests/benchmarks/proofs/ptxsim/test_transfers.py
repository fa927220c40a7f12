"""Atomics on global memory."""

from __future__ import annotations

import itertools

import torch

from tests.support.handwritten_ptx import run


def test_atomics_see_each_other() -> None:
    total, top = torch.zeros(1), torch.zeros(1, dtype=torch.int32)
    before, swapped = torch.zeros(128, dtype=torch.int32), torch.zeros(128, dtype=torch.int32)
    body = """mov.u32 %r1, %ctaid.x; mad.lo.s32 %r1, %r1, 64, %r99; cvt.rn.f32.u32 %r2, %r1;
    mad.wide.u32 %rd1, %r1, 4, %rd12; mad.wide.u32 %rd2, %r1, 4, %rd13;
    atom.global.gpu.acq_rel.add.f32 %r3, [%rd10], %r2; cvt.rni.s32.f32 %r3, %r3; st.global.b32 [%rd1], %r3;
    red.global.gpu.relaxed.max.s32 [%rd11], %r1; atom.global.gpu.relaxed.cas.b32 %r4, [%rd11], 127, 500;
    st.global.b32 [%rd2], %r4;"""
    run(body, total, top, before, swapped, threads=64, ctas=2)
    assert total.item() == sum(range(128))
    found = sorted(zip(before.tolist(), range(128), strict=True))  # each lane adds its number to what it finds
    assert all(now + lane == later for (now, lane), (later, _) in itertools.pairwise(found))
    assert top.item() == 500
    assert (swapped == 127).sum() == 1  # exactly one lane found the number that it compared with
