"""Attention within packed sequences, forward and backward (Triton).

For every sequence s and head h, with n_q queries and n_k keys of width D (only the device knows n_q and n_k):

    S = q k^T * scale * log2(e)        [n_q, n_k]             base 2: exponentials are 2^x
    lse = log2(sum_k 2^S)              [n_q]                  saved, fp32 [H, total queries]
    P = 2^(S - lse)                    [n_q, n_k]             never stored
    out = P v                          [n_q, D]
    d_v = P^T d_out                    [n_k, D]
    d_P = d_out v^T                    [n_q, n_k]
    delta = rowsum(P * d_P) = rowsum(out * d_out)             [n_q]
    d_S = P * (d_P - delta)            [n_q, n_k]
    d_q = d_S k * scale,  d_k = d_S^T q * scale               [n_q, D], [n_k, D]

q [T_q, H, D], k and v [T_k, H, D] may have any row stride, so that they may be views into the [T, 3, H, D] of a fused
projection. So may their gradients, so that one buffer takes all three. out and d_out are contiguous.

A width that is no power of two is held as two tiles: P0 is the largest power of two within it, and P1 is the rest, rounded
up. 80 = 64 + 16 costs the tensor cores 80 columns, not 128. Dot products over the width add up both tiles, and results
consist of both.

Short sequences (`takes_whole`) get one program per (sequence, head). It reads keys and values once, the softmax needs one
pass, and the backward writes all three gradients from five matmuls, with delta computed from P and d_P in place. Longer
sequences are cut into blocks. The forward streams the keys past a block of queries with a running softmax. The backward is a
pass that computes delta from out, then one kernel over blocks of keys for d_k and d_v, and one over blocks of queries for
d_q. That makes seven matmuls instead of the five of a loop that adds to d_q in memory, but there is no scratch memory to
write and read, no kernel holds three accumulators, and a few long sequences still fill the device. Nothing is summed across
programs, so results do not vary from run to run.

Grids come from bounds that the host knows; programs past the end of a sequence return at once. Rows past the last sequence
(where `total` is an upper bound) are set to 0.

The kernels are limited by memory. At the 20 to 260 tokens of a masked image, the forward does n/2 operations per byte of q,
k, v and out in half precision, and the backward less than twice that: far below the ratio of tensor cores to memory. What
counts is the number of programs that a multiprocessor holds, hence the small blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastjepa_kernels.ragged import Ragged
from fastjepa_kernels.triton_kernels import one_if_interpreted

_MAX_SEQUENCES = 65_535  # the limit of the second axis of a grid
_DELTA_ROWS = 32
_LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


class _Shape(NamedTuple):
    """The facts that decide whether a configuration fits into registers."""

    half: bool
    width: int
    """Columns of both tiles of a head together."""
    tiles: int
    keys: int
    """Keys that a program holds at a time."""


class _Candidate(NamedTuple):
    blocks: dict[str, int]
    num_warps: int
    num_stages: int
    fits: Callable[[_Shape], bool]
    """True for shapes that compile without spills on sm_90, with nearly none on sm_80, and with no wgmma serialized. These
    are findings of `python -m benchmarks.proofs.aot`."""


def _autotune(key: str, *candidates: _Candidate) -> Callable[[Any], Any]:
    """Run the fastest of the candidates that fit, for each head dim, dtype and `key`; in the interpreter, the first."""
    configs = [triton.Config(c.blocks, num_warps=c.num_warps, num_stages=c.num_stages) for c in candidates]
    fits = {id(config): candidate.fits for config, candidate in zip(configs, candidates, strict=True)}

    def prune(configs: list[triton.Config], arguments: dict[str, Any], **constants: Any) -> list[triton.Config]:
        given = arguments | constants
        p0, p1 = given["P0"], given["P1"]
        shapes = (
            _Shape(given["p_q"].dtype.itemsize == 2, p0 + p1, 1 + (p1 > 0), (given | config.kwargs)["KEYS"])
            for config in configs
        )
        return [config for config, shape in zip(configs, shapes, strict=True) if fits[id(config)](shape)]

    return triton.autotune(one_if_interpreted(configs), ["D", key], prune_configs_by={"early_config_prune": prune})


@triton.jit
def _sequence(p_cu):
    """The first row (int64) and the length of this program's sequence."""
    first = tl.load(p_cu + tl.program_id(1))
    return first.to(tl.int64), tl.load(p_cu + tl.program_id(1) + 1) - first


@triton.jit
def _zeros(ROWS: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr):
    if P1 == 0:
        return (tl.zeros((ROWS, P0), tl.float32),)
    else:
        return tl.zeros((ROWS, P0), tl.float32), tl.zeros((ROWS, P1), tl.float32)


@triton.jit
def _load_tile(p_rows, stride, m_rows, FIRST: tl.constexpr, P: tl.constexpr, D: tl.constexpr):
    o_rows = tl.arange(0, m_rows.shape[0])[:, None] * stride
    o_cols = FIRST + tl.arange(0, P)[None, :]
    if FIRST + P <= D:
        return tl.load(p_rows + o_rows + o_cols, m_rows[:, None], other=0.0)
    else:
        return tl.load(p_rows + o_rows + o_cols, m_rows[:, None] & (o_cols < D), other=0.0)


@triton.jit
def _store_tile(p_rows, stride, m_rows, x, FIRST: tl.constexpr, P: tl.constexpr, D: tl.constexpr):
    o_rows = tl.arange(0, m_rows.shape[0])[:, None] * stride
    o_cols = FIRST + tl.arange(0, P)[None, :]
    x = x.to(p_rows.dtype.element_ty)
    if FIRST + P <= D:
        tl.store(p_rows + o_rows + o_cols, x, m_rows[:, None])
    else:
        tl.store(p_rows + o_rows + o_cols, x, m_rows[:, None] & (o_cols < D))


@triton.jit
def _load(p_rows, stride, m_rows, D: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr):
    """Rows of width D as their tiles; 0 in masked rows and in columns past D."""
    if P1 == 0:
        return (_load_tile(p_rows, stride, m_rows, 0, P0, D),)
    else:
        return _load_tile(p_rows, stride, m_rows, 0, P0, D), _load_tile(p_rows, stride, m_rows, P0, P1, D)


@triton.jit
def _store(p_rows, stride, m_rows, x, D: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr):
    _store_tile(p_rows, stride, m_rows, x[0], 0, P0, D)
    if P1 > 0:
        _store_tile(p_rows, stride, m_rows, x[1], P0, P1, D)


@triton.jit
def _dot(a, b):
    """a b^T over the width, accumulated tile by tile."""
    s = tl.dot(a[0], b[0].T, input_precision="ieee")
    if len(a) == 2:
        s = tl.dot(a[1], b[1].T, s, input_precision="ieee")
    return s


@triton.jit
def _dot_add(w, x, acc):
    """acc + w x, tile by tile."""
    if len(x) == 1:
        return (tl.dot(w, x[0], acc[0], input_precision="ieee"),)
    else:
        return (
            tl.dot(w, x[0], acc[0], input_precision="ieee"),
            tl.dot(w, x[1], acc[1], input_precision="ieee"),
        )


@triton.jit
def _scale(x, factor):
    if len(x) == 1:
        return (x[0] * factor,)
    else:
        return x[0] * factor, x[1] * factor


@triton.jit
def _zero_rest(p_x, stride, p_cu, total, H: tl.constexpr, D: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr):
    """Write zeros to the rows after the last sequence. The programs of a head share this work."""
    BLOCK: tl.constexpr = 32
    blocks = tl.num_programs(0) // H
    rank = tl.program_id(1).to(tl.int64) * blocks + tl.program_id(0) // H
    end = tl.load(p_cu + tl.num_programs(1))
    for start in tl.range(end + rank * BLOCK, total, tl.num_programs(1).to(tl.int64) * blocks * BLOCK):
        p_rows = p_x + start * stride + tl.program_id(0) % H * D
        _store(p_rows, stride, start + tl.arange(0, BLOCK) < total, _zeros(BLOCK, P0, P1), D, P0, P1)


@_autotune(
    "KEYS",
    _Candidate({"QUERIES": 32}, 4, 2, lambda s: s.half),
    _Candidate({"QUERIES": 64}, 4, 2, lambda s: s.half and s.keys >= 64),
    _Candidate({"QUERIES": 128}, 8, 2, lambda s: s.half and s.keys == 128),
    _Candidate({"QUERIES": 16}, 4, 1, lambda s: not s.half),
)
@triton.jit(do_not_specialize=["total"])
def _attend_whole_kernel(
    p_q,
    p_k,
    p_v,
    p_out,
    p_lse,
    p_cu_queries,
    p_cu_keys,
    q_stride,
    k_stride,
    v_stride,
    total,
    scale,
    H: tl.constexpr,
    D: tl.constexpr,
    P0: tl.constexpr,
    P1: tl.constexpr,
    KEYS: tl.constexpr,
    QUERIES: tl.constexpr,
):
    """One program per (sequence, head) of at most KEYS keys; the softmax of a block of queries needs one pass."""
    head = tl.program_id(0)
    _zero_rest(p_out, H * D, p_cu_queries, total, H, D, P0, P1)
    first_query, num_queries = _sequence(p_cu_queries)
    first_key, num_keys = _sequence(p_cu_keys)
    p_q += head * D
    p_out += head * D
    p_lse += head.to(tl.int64) * total + first_query
    m_keys = tl.arange(0, KEYS) < num_keys
    k = _load(p_k + first_key * k_stride + head * D, k_stride, m_keys, D, P0, P1)  # [KEYS, D]
    v = _load(p_v + first_key * v_stride + head * D, v_stride, m_keys, D, P0, P1)  # [KEYS, D]
    for start in tl.range(0, num_queries, QUERIES):
        o_queries = start + tl.arange(0, QUERIES)
        m_queries = o_queries < num_queries
        row = first_query + start
        q = _load(p_q + row * q_stride, q_stride, m_queries, D, P0, P1)  # [QUERIES, D]
        s = tl.where(m_keys[None, :], _dot(q, k) * (scale * _LOG2_E), float("-inf"))  # [QUERIES, KEYS], base 2
        top = tl.where(num_keys > 0, tl.max(s, 1), 0.0)  # [QUERIES]; without keys P is 0, not NaN
        p = tl.exp2(s - top[:, None])
        norm = tl.where(num_keys > 0, tl.sum(p, 1), 1.0)
        out = _dot_add(p.to(v[0].dtype), v, _zeros(QUERIES, P0, P1))  # [QUERIES, D]
        out = _scale(out, (1 / norm)[:, None])
        _store(p_out + row * (H * D), H * D, m_queries, out, D, P0, P1)
        tl.store(p_lse + o_queries, top + tl.log2(norm), m_queries)


@_autotune(
    "longest",
    _Candidate({"QUERIES": 32, "KEYS": 64}, 4, 2, lambda s: s.half and s.width != 96),
    _Candidate({"QUERIES": 64, "KEYS": 64}, 4, 2, lambda s: s.half and s.width < 96),
    _Candidate({"QUERIES": 64, "KEYS": 64}, 4, 3, lambda s: s.half and s.width < 128),
    _Candidate({"QUERIES": 128, "KEYS": 64}, 8, 2, lambda s: s.half),
    _Candidate({"QUERIES": 16, "KEYS": 32}, 4, 1, lambda s: not s.half),
)
@triton.jit(do_not_specialize=["total", "longest"])
def _attend_tiled_kernel(
    p_q,
    p_k,
    p_v,
    p_out,
    p_lse,
    p_cu_queries,
    p_cu_keys,
    q_stride,
    k_stride,
    v_stride,
    total,
    scale,
    longest,
    H: tl.constexpr,
    D: tl.constexpr,
    P0: tl.constexpr,
    P1: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """One program per (block of queries, head, sequence); the keys stream past it, with a running softmax."""
    head = tl.program_id(0) % H
    start = tl.program_id(0) // H * QUERIES
    _zero_rest(p_out, H * D, p_cu_queries, total, H, D, P0, P1)
    first_query, num_queries = _sequence(p_cu_queries)
    if start >= num_queries:
        return
    first_query += start
    first_key, num_keys = _sequence(p_cu_keys)
    p_k += head * D
    p_v += head * D
    m_queries = start + tl.arange(0, QUERIES) < num_queries
    q = _load(p_q + first_query * q_stride + head * D, q_stride, m_queries, D, P0, P1)  # [QUERIES, D]
    out = _zeros(QUERIES, P0, P1)
    top = tl.full((QUERIES,), float("-inf"), tl.float32)
    norm = tl.zeros((QUERIES,), tl.float32)
    for start_key in tl.range(0, num_keys, KEYS):
        m_keys = start_key + tl.arange(0, KEYS) < num_keys
        row = first_key + start_key
        k = _load(p_k + row * k_stride, k_stride, m_keys, D, P0, P1)  # [KEYS, D]
        s = tl.where(m_keys[None, :], _dot(q, k) * (scale * _LOG2_E), float("-inf"))  # [QUERIES, KEYS], base 2
        new_top = tl.maximum(top, tl.max(s, 1))  # [QUERIES]
        p = tl.exp2(s - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        norm = norm * shrink + tl.sum(p, 1)
        top = new_top
        v = _load(p_v + row * v_stride, v_stride, m_keys, D, P0, P1)  # [KEYS, D]
        out = _dot_add(p.to(v[0].dtype), v, _scale(out, shrink[:, None]))
    norm = tl.where(num_keys > 0, norm, 1.0)
    out = _scale(out, (1 / norm)[:, None])
    _store(p_out + first_query * (H * D) + head * D, H * D, m_queries, out, D, P0, P1)
    p_lse += head.to(tl.int64) * total + first_query
    tl.store(p_lse + tl.arange(0, QUERIES), top + tl.log2(norm), m_queries)


@triton.jit(do_not_specialize=["total"])
def _delta_kernel(
    p_out,
    p_d_out,
    p_delta,
    total,
    H: tl.constexpr,
    D: tl.constexpr,
    P0: tl.constexpr,
    P1: tl.constexpr,
    ROWS: tl.constexpr,
):
    """delta = rowsum(out * d_out), fp32 [H, total]."""
    head = tl.program_id(0) % H
    start = (tl.program_id(0) // H).to(tl.int64) * ROWS
    m_rows = start + tl.arange(0, ROWS) < total
    o_tile = start * (H * D) + head * D
    out = _load(p_out + o_tile, H * D, m_rows, D, P0, P1)
    d_out = _load(p_d_out + o_tile, H * D, m_rows, D, P0, P1)
    delta = tl.sum(out[0].to(tl.float32) * d_out[0].to(tl.float32), 1)
    if P1 > 0:
        delta += tl.sum(out[1].to(tl.float32) * d_out[1].to(tl.float32), 1)
    tl.store(p_delta + head.to(tl.int64) * total + start + tl.arange(0, ROWS), delta, m_rows)


@triton.jit(do_not_specialize=["total_queries", "total_keys", "longest"])
def _backward_keys_kernel(
    p_q,
    p_k,
    p_v,
    p_d_out,
    p_lse,
    p_delta,
    p_d_q,
    p_d_k,
    p_d_v,
    p_cu_queries,
    p_cu_keys,
    q_stride,
    k_stride,
    v_stride,
    d_q_stride,
    d_k_stride,
    d_v_stride,
    total_queries,
    total_keys,
    scale,
    longest,
    H: tl.constexpr,
    D: tl.constexpr,
    P0: tl.constexpr,
    P1: tl.constexpr,
    WHOLE: tl.constexpr,
    KEYS: tl.constexpr,
    QUERIES: tl.constexpr,
):
    """One program per (block of keys, head, sequence) for d_k and d_v, and for d_q too if the block is the WHOLE sequence.

    It computes the transposed S^T = k q^T, so that P^T and d_S^T, the weights of both sums, are left operands, which the
    matmul takes from registers.
    """
    head = tl.program_id(0) % H
    start = tl.program_id(0) // H * KEYS
    _zero_rest(p_d_k, d_k_stride, p_cu_keys, total_keys, H, D, P0, P1)
    _zero_rest(p_d_v, d_v_stride, p_cu_keys, total_keys, H, D, P0, P1)
    if WHOLE:
        _zero_rest(p_d_q, d_q_stride, p_cu_queries, total_queries, H, D, P0, P1)
    first_query, num_queries = _sequence(p_cu_queries)
    first_key, num_keys = _sequence(p_cu_keys)
    if not WHOLE and start >= num_keys:
        return
    first_key += start
    p_q += head * D
    p_d_out += head * D
    p_lse += head.to(tl.int64) * total_queries + first_query
    if not WHOLE:
        p_delta += head.to(tl.int64) * total_queries + first_query
    m_keys = start + tl.arange(0, KEYS) < num_keys
    k = _load(p_k + first_key * k_stride + head * D, k_stride, m_keys, D, P0, P1)  # [KEYS, D]
    v = _load(p_v + first_key * v_stride + head * D, v_stride, m_keys, D, P0, P1)  # [KEYS, D]
    d_k = _zeros(KEYS, P0, P1)
    d_v = _zeros(KEYS, P0, P1)
    # If the compiler hoisted the operands made of k and v out of the loop, they would take more registers than there are.
    for start_query in tl.range(0, num_queries, QUERIES, disable_licm=True):
        o_queries = start_query + tl.arange(0, QUERIES)
        m_queries = o_queries < num_queries
        row = first_query + start_query
        q = _load(p_q + row * q_stride, q_stride, m_queries, D, P0, P1)  # [QUERIES, D]
        d_out = _load(p_d_out + row * (H * D), H * D, m_queries, D, P0, P1)  # [QUERIES, D]
        lse = tl.load(p_lse + o_queries, m_queries, other=float("inf"))  # P = 0 past the end
        s = tl.where(m_keys[:, None], _dot(k, q) * (scale * _LOG2_E), float("-inf"))  # [KEYS, QUERIES], base 2
        p = tl.exp2(s - lse[None, :])
        d_v = _dot_add(p.to(q[0].dtype), d_out, d_v)
        d_p = _dot(v, d_out)  # [KEYS, QUERIES]
        delta = tl.sum(p * d_p, 0) if WHOLE else tl.load(p_delta + o_queries, m_queries, other=0.0)
        d_s = (p * (d_p - delta[None, :])).to(q[0].dtype)
        d_k = _dot_add(d_s, q, d_k)
        if WHOLE:
            d_q = _scale(_dot_add(d_s.T, k, _zeros(QUERIES, P0, P1)), scale)
            _store(p_d_q + row * d_q_stride + head * D, d_q_stride, m_queries, d_q, D, P0, P1)
    _store(p_d_k + first_key * d_k_stride + head * D, d_k_stride, m_keys, _scale(d_k, scale), D, P0, P1)
    _store(p_d_v + first_key * d_v_stride + head * D, d_v_stride, m_keys, d_v, D, P0, P1)


_backward_whole = _autotune(
    "KEYS",
    _Candidate({"QUERIES": 32}, 4, 2, lambda s: s.half and s.tiles == 1 and s.keys <= 64),
    _Candidate({"QUERIES": 32}, 8, 1, lambda s: s.half and s.tiles == 1 and s.keys >= 64),
    _Candidate({"QUERIES": 16}, 4, 2, lambda s: s.half and s.tiles == 2 and s.keys <= 32),
    _Candidate({"QUERIES": 16}, 8, 2, lambda s: s.half and s.tiles == 2 and s.keys >= 64 and s.width < 96),
    _Candidate({"QUERIES": 16}, 8, 1, lambda s: s.half and s.tiles == 2 and s.keys >= 64 and s.width >= 96),
    _Candidate({"QUERIES": 16}, 8, 1, lambda s: not s.half),
)(_backward_keys_kernel)

_backward_tiled_keys = _autotune(
    "longest",
    _Candidate({"QUERIES": 32, "KEYS": 64}, 4, 2, lambda s: s.half and s.width < 128),
    _Candidate({"QUERIES": 32, "KEYS": 64}, 8, 2, lambda s: s.half and s.width == 128),
    _Candidate({"QUERIES": 32, "KEYS": 128}, 8, 2, lambda s: s.half and s.width < 128),
    _Candidate({"QUERIES": 16, "KEYS": 32}, 8, 1, lambda s: not s.half),
)(_backward_keys_kernel)


@_autotune(
    "longest",
    _Candidate({"QUERIES": 32, "KEYS": 64}, 4, 2, lambda s: s.half),
    _Candidate({"QUERIES": 64, "KEYS": 64}, 4, 2, lambda s: s.half),
    _Candidate({"QUERIES": 128, "KEYS": 64}, 8, 2, lambda s: s.half and s.width < 128),
    _Candidate({"QUERIES": 16, "KEYS": 32}, 8, 1, lambda s: not s.half),
)
@triton.jit(do_not_specialize=["total", "longest"])
def _backward_queries_kernel(
    p_q,
    p_k,
    p_v,
    p_d_out,
    p_lse,
    p_delta,
    p_d_q,
    p_cu_queries,
    p_cu_keys,
    q_stride,
    k_stride,
    v_stride,
    d_q_stride,
    total,
    scale,
    longest,
    H: tl.constexpr,
    D: tl.constexpr,
    P0: tl.constexpr,
    P1: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """One program per (block of queries, head, sequence) for d_q."""
    head = tl.program_id(0) % H
    start = tl.program_id(0) // H * QUERIES
    _zero_rest(p_d_q, d_q_stride, p_cu_queries, total, H, D, P0, P1)
    first_query, num_queries = _sequence(p_cu_queries)
    if start >= num_queries:
        return
    first_query += start
    first_key, num_keys = _sequence(p_cu_keys)
    p_k += head * D
    p_v += head * D
    o_queries = tl.arange(0, QUERIES)
    m_queries = start + o_queries < num_queries
    o_statistics = head.to(tl.int64) * total + first_query
    q = _load(p_q + first_query * q_stride + head * D, q_stride, m_queries, D, P0, P1)  # [QUERIES, D]
    d_out = _load(p_d_out + first_query * (H * D) + head * D, H * D, m_queries, D, P0, P1)  # [QUERIES, D]
    lse = tl.load(p_lse + o_statistics + o_queries, m_queries, other=float("inf"))
    delta = tl.load(p_delta + o_statistics + o_queries, m_queries, other=0.0)
    d_q = _zeros(QUERIES, P0, P1)
    for start_key in tl.range(0, num_keys, KEYS):
        m_keys = start_key + tl.arange(0, KEYS) < num_keys
        row = first_key + start_key
        k = _load(p_k + row * k_stride, k_stride, m_keys, D, P0, P1)  # [KEYS, D]
        v = _load(p_v + row * v_stride, v_stride, m_keys, D, P0, P1)  # [KEYS, D]
        s = tl.where(m_keys[None, :], _dot(q, k) * (scale * _LOG2_E), float("-inf"))  # [QUERIES, KEYS], base 2
        p = tl.exp2(s - lse[:, None])
        d_s = (p * (_dot(d_out, v) - delta[:, None])).to(k[0].dtype)  # [QUERIES, KEYS]
        d_q = _dot_add(d_s, k, d_q)
    _store(p_d_q + first_query * d_q_stride + head * D, d_q_stride, m_queries, _scale(d_q, scale), D, P0, P1)


def _split(head_dim: int) -> tuple[int, int]:
    """The widths of the two tiles of a head; the second is 0 if one is enough. 64 = 64 + 0, 80 = 64 + 16, 88 <= 64 + 32."""
    first = max(16, 1 << (head_dim.bit_length() - 1))  # tensor cores take at least 16 columns
    rest = max(16, triton.next_power_of_2(head_dim - first)) if head_dim > first else 0
    return (first, rest) if rest < first else (2 * first, 0)


def _longest(bound: int) -> int:
    """The power of two up to which sequences share a configuration with those of length `bound`."""
    return max(16, triton.next_power_of_2(bound))


def takes_whole(max_keys: int, head_dim: int, dtype: torch.dtype) -> bool:
    """True if one program can hold all keys of a sequence, and in the backward their gradients, in registers."""
    longest = _longest(max_keys)
    return longest <= 128 and longest * sum(_split(head_dim)) <= (12_288 if dtype.itemsize == 2 else 4_096)


def _rows(x: Tensor) -> Tensor:
    """x itself, or a copy that the kernels can address: rows are contiguous, and 128 rows lie within 31 bits."""
    fits = x.stride(2) == 1 and x.stride(1) == x.shape[2] and x.stride(0) < 2**24
    return x if fits else x.contiguous()


def _grid(heads: int, lengths: Ragged, block: str) -> Callable[[dict[str, Any]], tuple[int, int]]:
    """A grid of (heads x blocks, sequences), where programs that share keys follow one another. `_zero_rest` needs at least
    one block."""
    return lambda meta: (heads * max(1, triton.cdiv(lengths.max_seqlen, meta[block])), lengths.num_seqs)


def _forward(q: Tensor, k: Tensor, v: Tensor, queries: Ragged, keys: Ragged, scale: float) -> tuple[Tensor, Tensor]:
    """out [T_q, H, D] and lse [H, T_q]."""
    if queries.num_seqs > _MAX_SEQUENCES:
        raise ValueError(
            f"block_attention: got {queries.num_seqs:,} sequences, expected at most {_MAX_SEQUENCES:,} (Triton's grid)"
        )
    total, heads, head_dim = q.shape
    q, k, v = _rows(q), _rows(k), _rows(v)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(heads, total, dtype=torch.float32, device=q.device)
    tensors = q, k, v, out, lse, queries.cu_seqlens, keys.cu_seqlens
    strides = q.stride(0), k.stride(0), v.stride(0)
    widths = heads, head_dim, *_split(head_dim)
    longest = _longest(keys.max_seqlen)
    if takes_whole(keys.max_seqlen, head_dim, q.dtype):
        _attend_whole_kernel[(heads, queries.num_seqs)](*tensors, *strides, total, scale, *widths, KEYS=longest)
    else:
        _attend_tiled_kernel[_grid(heads, queries, "QUERIES")](*tensors, *strides, total, scale, longest, *widths)
    return out, lse


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
    d_q: Tensor,
    d_k: Tensor,
    d_v: Tensor,
    queries: Ragged,
    keys: Ragged,
    scale: float,
) -> None:
    """Fill d_q, d_k and d_v, which may be views into one buffer."""
    total, heads, head_dim = q.shape
    q, k, v, d_out = _rows(q), _rows(k), _rows(v), d_out.contiguous()
    widths = heads, head_dim, *_split(head_dim)
    longest = _longest(keys.max_seqlen)
    lengths = queries.cu_seqlens, keys.cu_seqlens
    strides = q.stride(0), k.stride(0), v.stride(0), d_q.stride(0)
    key_numbers = *strides, d_k.stride(0), d_v.stride(0), total, len(k), scale, longest, *widths
    if takes_whole(keys.max_seqlen, head_dim, q.dtype):
        _backward_whole[(heads, queries.num_seqs)](
            *(q, k, v, d_out, lse, None, d_q, d_k, d_v), *lengths, *key_numbers, WHOLE=True, KEYS=longest
        )
        return
    delta = torch.empty_like(lse)
    _delta_kernel[(heads * triton.cdiv(total, _DELTA_ROWS),)](out, d_out, delta, total, *widths, _DELTA_ROWS)
    _backward_tiled_keys[_grid(heads, keys, "KEYS")](
        *(q, k, v, d_out, lse, delta, None, d_k, d_v), *lengths, *key_numbers, WHOLE=False
    )
    _backward_queries_kernel[_grid(heads, queries, "QUERIES")](
        *(q, k, v, d_out, lse, delta, d_q), *lengths, *strides, total, scale, longest, *widths
    )


@torch.library.custom_op("fastjepa::block_attention", mutates_args=())
def _attention(
    q: Tensor, k: Tensor, v: Tensor, cu_queries: Tensor, cu_keys: Tensor, max_queries: int, max_keys: int, scale: float
) -> tuple[Tensor, Tensor]:
    return _forward(q, k, v, Ragged(cu_queries, max_queries, len(q)), Ragged(cu_keys, max_keys, len(k)), scale)


@torch.library.custom_op("fastjepa::block_attention_backward", mutates_args=())
def _attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
    cu_queries: Tensor,
    cu_keys: Tensor,
    max_queries: int,
    max_keys: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    d_q, d_k, d_v = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    queries, keys = Ragged(cu_queries, max_queries, len(q)), Ragged(cu_keys, max_keys, len(k))
    _backward(q, k, v, out, lse, d_out, d_q, d_k, d_v, queries, keys, scale)
    return d_q, d_k, d_v


@torch.library.custom_op("fastjepa::block_attention_packed", mutates_args=())
def _packed_attention(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float) -> tuple[Tensor, Tensor]:
    lengths = Ragged(cu_seqlens, max_seqlen, len(qkv))
    q, k, v = qkv.unbind(1)
    return _forward(q, k, v, lengths, lengths, scale)


@torch.library.custom_op("fastjepa::block_attention_packed_backward", mutates_args=())
def _packed_attention_backward(
    qkv: Tensor, out: Tensor, lse: Tensor, d_out: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float
) -> Tensor:
    d_qkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    lengths = Ragged(cu_seqlens, max_seqlen, len(qkv))
    (q, k, v), (d_q, d_k, d_v) = qkv.unbind(1), d_qkv.unbind(1)
    _backward(q, k, v, out, lse, d_out, d_q, d_k, d_v, lengths, lengths, scale)
    return d_qkv


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_lengths: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


@_attention_backward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_others: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@_packed_attention.register_fake
def _(qkv: Tensor, *_lengths: Any) -> tuple[Tensor, Tensor]:
    total, _, heads, head_dim = qkv.shape
    return qkv.new_empty(total, heads, head_dim), qkv.new_empty(heads, total, dtype=torch.float32)


@_packed_attention_backward.register_fake
def _(qkv: Tensor, *_others: Any) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Save the inputs of either form: tensors (the lengths among them), followed by plain numbers."""
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.numbers = [x for x in inputs if not isinstance(x, Tensor)]
    ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)), *output)


def _differentiate_attention(ctx: Any, d_out: Tensor, _d_lse: None) -> tuple[Tensor | None, ...]:
    q, k, v, cu_queries, cu_keys, out, lse = ctx.saved_tensors
    grads = _attention_backward(q, k, v, out, lse, d_out, cu_queries, cu_keys, *ctx.numbers)
    return *grads, *[None] * 5


def _differentiate_packed_attention(ctx: Any, d_out: Tensor, _d_lse: None) -> tuple[Tensor | None, ...]:
    qkv, cu_seqlens, out, lse = ctx.saved_tensors
    return _packed_attention_backward(qkv, out, lse, d_out, cu_seqlens, *ctx.numbers), *[None] * 3


_attention.register_autograd(_differentiate_attention, setup_context=_save)
_packed_attention.register_autograd(_differentiate_packed_attention, setup_context=_save)


def attend(q: Tensor, k: Tensor, v: Tensor, queries: Ragged, keys: Ragged, scale: float) -> Tensor:
    lengths = queries.cu_seqlens, keys.cu_seqlens, queries.max_seqlen, keys.max_seqlen
    out: Tensor = _attention(q, k, v, *lengths, scale)[0]
    return out


def attend_packed(qkv: Tensor, lengths: Ragged, scale: float) -> Tensor:
    out: Tensor = _packed_attention(qkv, lengths.cu_seqlens, lengths.max_seqlen, scale)[0]
    return out
