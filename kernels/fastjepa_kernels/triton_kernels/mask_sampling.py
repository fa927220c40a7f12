"""Mask sampling on the GPU in three small launches, without atomics; the host reads nothing back (Triton).

1. `_sample`, one program per image, draws the target blocks and the context. It writes one int32 per patch, whose bit m says
   that target block m covers the patch and bit M that it is context, and the lengths of all sequences.
2. `_accumulate`, one program, cuts the lengths to the batch minimum (official mode) and sums them up to cu_seqlens.
3. `_pack`, one program per image, finds the rows of every patch by counting the kept patches before it, and writes them.

`fastjepa_kernels.masks` defines the shapes and `fastjepa_kernels.mask_sampling` the values. The masks equal the host's in
every bit, since all arithmetic is on integers.

It is limited by latency. 128 images of 196 patches are 0.4 MB of writes and 50 k Philox calls, which any GPU does in
microseconds. The stores are scattered by nature (8-byte entries at places that the lengths dictate), so they are not 128
bits wide.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastjepa_kernels import philox
from fastjepa_kernels.masks import ATTEMPTS, MaskRules, PackedMasks

_POSITION = tl.constexpr(philox.DOMAIN_BLOCK_POSITION)
_BUDGET = tl.constexpr(philox.DOMAIN_BUDGET)
_ATTEMPTS = tl.constexpr(ATTEMPTS)

_MAX_PATCHES = 4096  # one program holds an image
_MAX_BLOCKS = 30  # the bits of an int32 without the sign and the bit of the context
_SCAN_BLOCK = 1024


@triton.jit
def _patches(BLOCK_N: tl.constexpr):
    """0 to BLOCK_N - 1. The hint keeps neighbouring patches in neighbouring threads, for narrow but coalesced accesses. With
    wide accesses, every value that is stored at a place of its own would first change threads through shared memory."""
    return tl.max_contiguous(tl.arange(0, BLOCK_N), 1)


@triton.jit
def _uniform(word, bound):
    """An integer below `bound` from a word, as `philox.uniform_int` makes it."""
    return tl.umulhi(word, bound.to(tl.uint32)).to(tl.int32)


@triton.jit
def _corner(seed, step, sample, draw, rows, cols):
    """Top and left of a draw, one of rows x cols places."""
    w0, w1, w2, w3 = tl.philox(seed, draw // 2, _POSITION, sample, step)
    even = draw % 2 == 0
    return _uniform(tl.where(even, w0, w2), rows), _uniform(tl.where(even, w1, w3), cols)


@triton.jit
def _smallest(mask, count, seed, step, sample, domain: tl.constexpr, BLOCK_N: tl.constexpr):
    """int1 [BLOCK_N]: the `count` patches of a mask with the smallest words of a stream; the earlier one of equal words."""
    o_n = _patches(BLOCK_N)
    # Four patches share the words of a call. Each repeats the call, which is cheaper than passing words between threads.
    w0, w1, w2, w3 = tl.philox(seed, o_n // 4, domain, sample, step)
    words = tl.where(o_n % 2 == 0, tl.where(o_n % 4 == 0, w0, w2), tl.where(o_n % 4 == 1, w1, w3))  # uint32 [BLOCK_N]
    # Find the count-th smallest word bit by bit: it is the largest number that fewer than `count` words are below.
    last = tl.full([], 0, tl.uint32)
    for i in range(32):
        larger = last | (tl.full([], 1, tl.uint32) << (31 - i))
        num_below = tl.sum((mask & (words < larger)).to(tl.int32), 0)
        last = tl.where(num_below < count, larger, last)
    below = mask & (words < last)
    equal = mask & (words == last)
    num_equal = count - tl.sum(below.to(tl.int32), 0)
    return below | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= num_equal))


# The numbers that change from step to step must not be specialised on: every new combination would be compiled anew.
@triton.jit(do_not_specialize=["seed", "step", "target_h", "target_w", "context_h", "context_w", "target_count"])
def _sample(
    p_samples,  # int64 [B]
    p_members,  # int32 [B, BLOCK_N]
    p_context_lengths,  # int32 [B]
    p_target_lengths,  # int32 [B, M]
    p_union_lengths,  # int32 [B]
    seed: tl.int64,
    step: tl.int64,
    target_h: tl.int32,
    target_w: tl.int32,
    context_h: tl.int32,
    context_w: tl.int32,
    target_count: tl.int32,
    STRATEGY: tl.constexpr,
    BUDGET: tl.constexpr,
    GRID_H: tl.constexpr,
    GRID_W: tl.constexpr,
    REACH_H: tl.constexpr,
    REACH_W: tl.constexpr,
    M: tl.constexpr,
    MIN_CONTEXT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    image = tl.program_id(0)
    sample = tl.load(p_samples + image).to(tl.uint32)
    step = step.to(tl.uint32)
    o_n = _patches(BLOCK_N)
    row = o_n // GRID_W
    col = o_n % GRID_W
    m_n = o_n < GRID_H * GRID_W
    members = tl.zeros([BLOCK_N], tl.int32)

    if STRATEGY == "multiblock" or STRATEGY == "block":
        for m in range(M):
            top, left = _corner(seed, step, sample, m, REACH_H - target_h + 1, REACH_W - target_w + 1)
            inside = (row >= top) & (row < top + target_h) & (col >= left) & (col < left + target_w)
            members |= inside.to(tl.int32) << m
        context = m_n & (members == 0)
    if STRATEGY == "multiblock":
        attempt = 0
        num_left = 0
        # The loop ends: the last attempts subtract nothing, and MaskRules refuses a context block below MIN_CONTEXT.
        while num_left < MIN_CONTEXT:
            top, left = _corner(seed, step, sample, M + attempt, REACH_H - context_h + 1, REACH_W - context_w + 1)
            inside = (row >= top) & (row < top + context_h) & (col >= left) & (col < left + context_w)
            subtracted = (1 << (M - attempt // _ATTEMPTS)) - 1
            context = inside & ((members & subtracted) == 0)
            num_left = tl.sum(context.to(tl.int32), 0)
            attempt += 1
    if STRATEGY == "random":
        target = _smallest(m_n, target_count, seed, step, sample, _POSITION, BLOCK_N)
        members = target.to(tl.int32)
        context = m_n & ~target
    if STRATEGY == "rasterized":
        quadrant = 2 * (row >= GRID_H // 2).to(tl.int32) + (col >= GRID_W // 2).to(tl.int32)
        word, _, _, _ = tl.philox(seed, 0, _POSITION, sample, step)
        own = (word >> 30).to(tl.int32)  # uniform below 4
        context = m_n & (quadrant == own)
        members = tl.where(m_n & (quadrant != own), 1 << (quadrant - (quadrant > own).to(tl.int32)), 0)

    if BUDGET:
        context = _smallest(context, MIN_CONTEXT, seed, step, sample, _BUDGET, BLOCK_N)
    for m in range(M):
        tl.store(p_target_lengths + image.to(tl.int64) * M + m, tl.sum((members >> m) & 1, 0))
    tl.store(p_union_lengths + image, tl.sum((members != 0).to(tl.int32), 0))
    tl.store(p_context_lengths + image, tl.sum(context.to(tl.int32), 0))
    tl.store(p_members + image.to(tl.int64) * BLOCK_N + o_n, members | (context.to(tl.int32) << M))


@triton.jit
def _minimum(p_lengths, num_seqs, BLOCK: tl.constexpr):
    least = tl.full([BLOCK], 2**31 - 1, tl.int32)
    for start in range(0, num_seqs, BLOCK):
        o_s = start + tl.arange(0, BLOCK)
        least = tl.minimum(least, tl.load(p_lengths + o_s, mask=o_s < num_seqs, other=2**31 - 1))
    return tl.min(least, 0)


@triton.jit
def _append(p_cu_seqlens, o_s, m_s, total, lengths):
    """Write the ends of the sequences o_s, whose lengths are 0 outside m_s and which follow `total` tokens; return the new
    total."""
    tl.store(p_cu_seqlens + 1 + o_s, total + tl.cumsum(lengths, 0), mask=m_s)
    return total + tl.sum(lengths, 0)


@triton.jit(do_not_specialize=["num_images"])
def _accumulate(
    p_context_lengths,  # int32 [B]
    p_target_lengths,  # int32 [B, M]
    p_union_lengths,  # int32 [B]
    p_context_cu_seqlens,  # int32 [B + 1]
    p_target_cu_seqlens,  # int32 [B * M + 1]
    p_union_cu_seqlens,  # int32 [B + 1]
    p_predictor_cu_seqlens,  # int32 [B * M + 1]
    p_sizes,  # int64 [2, 4]
    num_images: tl.int32,
    CUT: tl.constexpr,
    M: tl.constexpr,
    BLOCK: tl.constexpr,
):
    context_cut = 2**31 - 1
    target_cut = 2**31 - 1
    if CUT:
        context_cut = _minimum(p_context_lengths, num_images, BLOCK)
        target_cut = _minimum(p_target_lengths, num_images * M, BLOCK)
    context_total = 0
    target_total = 0
    union_total = 0
    predictor_total = 0
    context_longest = tl.zeros([BLOCK], tl.int32)
    target_longest = tl.zeros([BLOCK], tl.int32)
    union_longest = tl.zeros([BLOCK], tl.int32)
    predictor_longest = tl.zeros([BLOCK], tl.int32)

    tl.store(p_context_cu_seqlens, 0)
    tl.store(p_union_cu_seqlens, 0)
    for start in range(0, num_images, BLOCK):
        o_b = start + tl.arange(0, BLOCK)
        m_b = o_b < num_images
        context = tl.minimum(tl.load(p_context_lengths + o_b, mask=m_b, other=0), context_cut)
        union = tl.load(p_union_lengths + o_b, mask=m_b, other=0)
        if CUT:  # the cut shortens only quadrants, which are disjoint: blocks and random targets are all of one length
            union = tl.minimum(union, M * target_cut)
        context_total = _append(p_context_cu_seqlens, o_b, m_b, context_total, context)
        union_total = _append(p_union_cu_seqlens, o_b, m_b, union_total, union)
        context_longest = tl.maximum(context_longest, context)
        union_longest = tl.maximum(union_longest, union)

    tl.store(p_target_cu_seqlens, 0)
    tl.store(p_predictor_cu_seqlens, 0)
    for start in range(0, num_images * M, BLOCK):
        o_s = start + tl.arange(0, BLOCK)
        m_s = o_s < num_images * M
        context = tl.minimum(tl.load(p_context_lengths + o_s // M, mask=m_s, other=0), context_cut)
        target = tl.minimum(tl.load(p_target_lengths + o_s, mask=m_s, other=0), target_cut)
        target_total = _append(p_target_cu_seqlens, o_s, m_s, target_total, target)
        predictor_total = _append(p_predictor_cu_seqlens, o_s, m_s, predictor_total, context + target)
        target_longest = tl.maximum(target_longest, target)
        predictor_longest = tl.maximum(predictor_longest, context + target)

    tl.store(p_sizes + 0, context_total)
    tl.store(p_sizes + 1, target_total)
    tl.store(p_sizes + 2, union_total)
    tl.store(p_sizes + 3, predictor_total)
    tl.store(p_sizes + 4, tl.max(context_longest, 0))
    tl.store(p_sizes + 5, tl.max(target_longest, 0))
    tl.store(p_sizes + 6, tl.max(union_longest, 0))
    tl.store(p_sizes + 7, tl.max(predictor_longest, 0))


@triton.jit
def _first(members, bit, length):
    """The first `length` patches that have `bit`, as a mask, and the number of each among them, counted from 0."""
    chosen = (members >> bit) & 1
    number = tl.cumsum(chosen, 0) - 1
    return (chosen != 0) & (number < length), number


@triton.jit(do_not_specialize=["num_images"])
def _pack(
    p_members,  # int32 [B, BLOCK_N]
    p_context_cu_seqlens,  # int32 [B + 1]
    p_target_cu_seqlens,  # int32 [B * M + 1]
    p_union_cu_seqlens,  # int32 [B + 1]
    p_predictor_cu_seqlens,  # int32 [B * M + 1]
    p_context_indices,  # int64 [T_c], as all below
    p_target_indices,  # [T_t]
    p_union_indices,  # [T_u]
    p_union_rows,  # [T_t]
    p_predictor_rows,  # [T_p]
    p_predictor_target_rows,  # [T_t]
    num_images: tl.int32,
    N: tl.constexpr,
    M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    o_n = _patches(BLOCK_N)
    index = image * N + o_n  # int64 [BLOCK_N]
    members = tl.load(p_members + image * BLOCK_N + o_n)

    context_start = tl.load(p_context_cu_seqlens + image)
    context_length = tl.load(p_context_cu_seqlens + image + 1) - context_start
    context_total = tl.load(p_context_cu_seqlens + num_images)
    m_context, number = _first(members, M, context_length)
    tl.store(p_context_indices + context_start + number, index, mask=m_context)

    m_union = tl.zeros([BLOCK_N], tl.int1)
    for m in range(M):
        p_start = p_target_cu_seqlens + image * M + m
        m_target, _ = _first(members, m, tl.load(p_start + 1) - tl.load(p_start))
        m_union |= m_target
    union_row = tl.load(p_union_cu_seqlens + image) + tl.cumsum(m_union.to(tl.int32), 0) - 1
    tl.store(p_union_indices + union_row, index, mask=m_union)

    for m in range(M):
        p_start = p_target_cu_seqlens + image * M + m
        target_start = tl.load(p_start)
        m_target, number = _first(members, m, tl.load(p_start + 1) - target_start)
        predictor_start = tl.load(p_predictor_cu_seqlens + image * M + m)
        target_row = target_start + number
        predictor_row = predictor_start + context_length + number
        tl.store(p_target_indices + target_row, index, mask=m_target)
        tl.store(p_union_rows + target_row, union_row, mask=m_target)
        tl.store(p_predictor_target_rows + target_row, predictor_row, mask=m_target)
        tl.store(p_predictor_rows + predictor_row, context_total + o_n, mask=m_target)
        tl.store(p_predictor_rows + predictor_start + o_n, context_start + o_n, mask=o_n < context_length)


def _allocate(rules: MaskRules, num_images: int, device: torch.device) -> PackedMasks:
    num_seqs = num_images * rules.num_target_blocks

    def indices(per_image: int) -> Tensor:
        return torch.zeros(num_images * per_image, dtype=torch.int64, device=device)  # entries beyond the sizes stay 0

    def cu_seqlens(num_seqs: int) -> Tensor:
        return torch.empty(num_seqs + 1, dtype=torch.int32, device=device)

    return PackedMasks(
        context_indices=indices(rules.max_context),
        context_cu_seqlens=cu_seqlens(num_images),
        target_indices=indices(rules.max_target),
        target_cu_seqlens=cu_seqlens(num_seqs),
        union_indices=indices(rules.max_union),
        union_cu_seqlens=cu_seqlens(num_images),
        union_rows=indices(rules.max_target),
        predictor_rows=indices(rules.max_predictor),
        predictor_cu_seqlens=cu_seqlens(num_seqs),
        predictor_target_rows=indices(rules.max_target),
        sizes=torch.empty(2, 4, dtype=torch.int64, device=device),
    )


@torch.library.custom_op("fastjepa::mask_sampling", mutates_args=())
def _mask_sampling(
    sample_indices: Tensor, strategy: str, mode: str, numbers: Sequence[int], seed: int, step: int
) -> list[Tensor]:
    """PackedMasks as a list, for MaskRules(strategy, mode, *numbers). `seed` is the bits of the seed as a signed number."""
    rules = MaskRules(strategy, mode, *numbers)  # type: ignore[arg-type]
    num_images, num_blocks, device = len(sample_indices), rules.num_target_blocks, sample_indices.device
    block_n = max(16, triton.next_power_of_2(rules.num_patches))
    num_warps = max(block_n // 256, 1)
    masks = _allocate(rules, num_images, device)
    members = torch.empty(num_images, block_n, dtype=torch.int32, device=device)
    context_lengths = torch.empty(num_images, dtype=torch.int32, device=device)
    target_lengths = torch.empty(num_images, num_blocks, dtype=torch.int32, device=device)
    union_lengths = torch.empty(num_images, dtype=torch.int32, device=device)
    _sample[(num_images,)](
        sample_indices,
        members,
        context_lengths,
        target_lengths,
        union_lengths,
        seed,
        step,
        rules.target_h,
        rules.target_w,
        rules.context_h,
        rules.context_w,
        rules.target_count,
        STRATEGY=strategy,
        BUDGET=mode == "budget",
        GRID_H=rules.grid_h,
        GRID_W=rules.grid_w,
        REACH_H=rules.reach_h,
        REACH_W=rules.reach_w,
        M=num_blocks,
        MIN_CONTEXT=rules.min_context,
        BLOCK_N=block_n,
        num_warps=num_warps,
    )
    cu_seqlens = (
        masks.context_cu_seqlens,
        masks.target_cu_seqlens,
        masks.union_cu_seqlens,
        masks.predictor_cu_seqlens,
    )
    _accumulate[(1,)](
        context_lengths,
        target_lengths,
        union_lengths,
        *cu_seqlens,
        masks.sizes,
        num_images,
        CUT=mode == "official",
        M=num_blocks,
        BLOCK=_SCAN_BLOCK,
    )
    _pack[(num_images,)](
        members,
        *cu_seqlens,
        masks.context_indices,
        masks.target_indices,
        masks.union_indices,
        masks.union_rows,
        masks.predictor_rows,
        masks.predictor_target_rows,
        num_images,
        N=rules.num_patches,
        M=num_blocks,
        BLOCK_N=block_n,
        num_warps=num_warps,
    )
    return list(masks)


@_mask_sampling.register_fake
def _(sample_indices: Tensor, strategy: str, mode: str, numbers: Sequence[int], seed: int, step: int) -> list[Tensor]:
    rules = MaskRules(strategy, mode, *numbers)  # type: ignore[arg-type]
    return list(_allocate(rules, len(sample_indices), sample_indices.device))


def mask_sampling_triton(rules: MaskRules, seed: int, step: int, sample_indices: Tensor) -> PackedMasks:
    """Sample as `fastjepa_kernels.mask_sampling` does, which has checked the arguments.

    Raises:
        ValueError: there are more patches or target blocks than one program holds.
    """
    for name, got, limit in (
        ("patches", rules.num_patches, _MAX_PATCHES),
        ("target blocks", rules.num_target_blocks, _MAX_BLOCKS),
    ):
        if got > limit:
            raise ValueError(
                f"mask_sampling: got {got} {name}, expected up to {limit}; use mask_sampling = torch for more"
            )
    strategy, mode, *numbers = astuple(rules)
    signed_seed = seed - 2**64 if seed >= 2**63 else seed  # an operator's integers are int64
    return PackedMasks(*_mask_sampling(sample_indices.contiguous(), strategy, mode, numbers, signed_seed, step))
