"""Self-attention within packed sequences of different lengths (block-diagonal attention).

For every sequence s and head h:  out_s = softmax(q_s k_s^T * scale) v_s,  with q_s [queries_s, head_dim] and k_s, v_s
[keys_s, head_dim]. There may be fewer queries than keys: the last block of an encoder needs outputs for some tokens only.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastjepa_kernels.ragged import Ragged
from fastjepa_kernels.selection import choose


class _Bucket(NamedTuple):
    """Sequences that have the same number of queries and the same number of keys: one dense SDPA call."""

    num_seqs: int
    queries: int
    keys: int


class _BucketPlan(NamedTuple):
    buckets: tuple[_Bucket, ...]
    query_order: tuple[Tensor, Tensor] | None
    """The permutation of rows that brings the sequences of a bucket together, and its inverse. None: they already are."""
    key_order: tuple[Tensor, Tensor] | None


def _rows_by_rank(lengths: Tensor, rank: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of packed sequences in the order of their sequences' ranks, and the inverse permutation."""
    order = rank.repeat_interleave(lengths).argsort(stable=True)
    return order, order.argsort()


@lru_cache(maxsize=32)  # all blocks of a model share the plan of a batch
def _plan_buckets(cu_queries: tuple[int, ...], cu_keys: tuple[int, ...]) -> _BucketPlan:
    queries, keys = torch.tensor(cu_queries).diff(), torch.tensor(cu_keys).diff()
    shape = queries * (int(keys.max()) + 1) + keys
    shapes, counts = shape.unique(return_counts=True)
    first = [int((shape == value).nonzero()[0]) for value in shapes]
    buckets = tuple(_Bucket(int(n), int(queries[i]), int(keys[i])) for i, n in zip(first, counts, strict=True))
    if bool((shape.diff() >= 0).all()):
        return _BucketPlan(buckets, None, None)
    rank = shape.argsort(stable=True).argsort()
    query_order = _rows_by_rank(queries, rank)
    return _BucketPlan(buckets, query_order, query_order if cu_keys == cu_queries else _rows_by_rank(keys, rank))


class _PermuteRows(torch.autograd.Function):
    """x[rows] for a permutation. The gradient is a gather too, where that of indexing would be a scatter-add."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(rows, inverse)
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        rows, inverse = ctx.saved_tensors
        return _permute(grads[0], (inverse, rows)), None, None


def _permute(x: Tensor, order: tuple[Tensor, Tensor] | None) -> Tensor:
    return x if order is None else _PermuteRows.apply(x, *order)  # type: ignore[no-untyped-call]


def _attend_bucket(bucket: _Bucket, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    if not bucket.queries or not bucket.keys:
        return torch.zeros_like(q)  # attention over nothing is 0
    dense_q, dense_k, dense_v = (x.unflatten(0, (bucket.num_seqs, -1)).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(dense_q, dense_k, dense_v, scale=scale)
    return out.transpose(1, 2).flatten(0, 1)


def _join_buckets(outs: list[Tensor], plan: _BucketPlan) -> Tensor:
    out = outs[0] if len(outs) == 1 else torch.cat(outs)
    return _permute(out, plan.query_order and plan.query_order[::-1])


# Buckets are taken by split(), not by slices: its backward writes each gradient once, where the backward of every slice
# fills a tensor of the full size.
def _attend_buckets(q: Tensor, k: Tensor, v: Tensor, queries: Ragged, keys: Ragged, scale: float) -> Tensor:
    plan = _plan_buckets(tuple(queries.cu_seqlens.tolist()), tuple(keys.cu_seqlens.tolist()))
    key_rows = [b.num_seqs * b.keys for b in plan.buckets]
    qs = _permute(q, plan.query_order).split([b.num_seqs * b.queries for b in plan.buckets])
    ks, vs = (_permute(x, plan.key_order).split(key_rows) for x in (k, v))
    outs = [_attend_bucket(bucket, q, k, v, scale) for bucket, q, k, v in zip(plan.buckets, qs, ks, vs, strict=True)]
    return _join_buckets(outs, plan)


def _attend_buckets_packed(qkv: Tensor, lengths: Ragged, scale: float) -> Tensor:
    """`_attend_buckets` of a fused projection, with one permutation instead of three."""
    cu_seqlens = tuple(lengths.cu_seqlens.tolist())
    plan = _plan_buckets(cu_seqlens, cu_seqlens)
    parts = _permute(qkv, plan.query_order).split([b.num_seqs * b.keys for b in plan.buckets])
    outs = []
    for bucket, part in zip(plan.buckets, parts, strict=True):
        q, k, v = part.unbind(1)
        outs.append(_attend_bucket(bucket, q, k, v, scale))
    return _join_buckets(outs, plan)


def _attend_padded(q: Tensor, k: Tensor, v: Tensor, queries: Ragged, keys: Ragged, scale: float) -> Tensor:
    """Dense attention over padded sequences. It needs no synchronisation: the padded shapes come from `max_seqlen`."""

    def slots(lengths: Ragged) -> Tensor:  # [total]: the row of each token in the padded layout
        seq = lengths.sequence_ids()
        return seq * lengths.max_seqlen + torch.arange(lengths.total, device=q.device) - lengths.cu_seqlens[seq]

    def pad(x: Tensor, lengths: Ragged, rows: Tensor) -> Tensor:  # [num_seqs, heads, max_seqlen, head_dim]
        dense = x.new_zeros(lengths.num_seqs * lengths.max_seqlen, *x.shape[1:]).index_copy(0, rows, x)
        return dense.unflatten(0, (lengths.num_seqs, lengths.max_seqlen)).transpose(1, 2)

    query_slots, key_slots = slots(queries), slots(keys)
    mask = torch.arange(keys.max_seqlen, device=q.device) < keys.lengths()[:, None]  # True: attend
    # A sequence without keys would be masked everywhere, and its softmax NaN: let it see one row, whose value is zero.
    mask[:, :1] |= (keys.lengths() == 0)[:, None]
    out = F.scaled_dot_product_attention(
        pad(q, queries, query_slots),
        pad(k, keys, key_slots),
        pad(v, keys, key_slots),
        attn_mask=mask[:, None, None, :],
        scale=scale,
    )
    return out.transpose(1, 2).flatten(0, 1).index_select(0, query_slots)


def _attend_varlen(q: Tensor, k: Tensor, v: Tensor, queries: Ragged, keys: Ragged, scale: float) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    out = varlen_attn(q, k, v, queries.cu_seqlens, keys.cu_seqlens, queries.max_seqlen, keys.max_seqlen, scale=scale)
    assert isinstance(out, Tensor)
    return out


def _attend_xformers(q: Tensor, k: Tensor, v: Tensor, queries: Ragged, keys: Ragged, scale: float) -> Tensor:
    from xformers.ops import fmha
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask, _SeqLenInfo

    # The public constructor takes the lengths on the host, where they serve checks only: the total and a bound will do.
    blocks = (
        _SeqLenInfo(seqstart=x.cu_seqlens, max_seqlen=x.max_seqlen, min_seqlen=0, seqstart_py=[0, x.total])
        for x in (queries, keys)
    )
    out = fmha.memory_efficient_attention(q[None], k[None], v[None], BlockDiagonalMask(*blocks), scale=scale)
    assert isinstance(out, Tensor)
    return out[0]


def _attend_triton(q: Tensor, k: Tensor, v: Tensor, queries: Ragged, keys: Ragged, scale: float) -> Tensor:
    from fastjepa_kernels.triton_kernels.block_attention import attend

    return attend(q, k, v, queries, keys, scale)


def _attend_triton_packed(qkv: Tensor, lengths: Ragged, scale: float) -> Tensor:
    from fastjepa_kernels.triton_kernels.block_attention import attend_packed

    return attend_packed(qkv, lengths, scale)


IMPLEMENTATIONS = {
    "triton": _attend_triton,
    "varlen": _attend_varlen,
    "buckets": _attend_buckets,
    "padded": _attend_padded,
    "xformers": _attend_xformers,
}
# The implementations that gain from queries, keys and values in one tensor; for the others it is taken apart.
_PACKED_IMPLEMENTATIONS = {"triton": _attend_triton_packed, "buckets": _attend_buckets_packed}


def _check_device(name: str, x: Tensor, lengths: Ragged, like: Tensor) -> None:
    if x.dtype != like.dtype or x.device != like.device or lengths.cu_seqlens.device != like.device:
        raise ValueError(
            f"block_attention: {name} ({x.dtype}, {x.device}) and its cu_seqlens ({lengths.cu_seqlens.device}) "
            f"must match q ({like.dtype}, {like.device})"
        )


def block_attention(
    q: Tensor, k: Tensor, v: Tensor, queries: Ragged, keys: Ragged | None = None, *, scale: float | None = None
) -> Tensor:
    """Attend from every packed sequence to itself, without a causal mask.

    Args:
        q: [queries.total, heads, head_dim], any strides.
        k, v: [keys.total, heads, head_dim], of q's dtype and device.
        queries: lengths of the query sequences.
        keys: lengths of as many key sequences; default: `queries`.
        scale: factor on the scores; default: head_dim^-1/2.

    Returns:
        [queries.total, heads, head_dim], q's dtype. Rows of a sequence without keys are 0.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.
    """
    keys = queries if keys is None else keys
    for name, x, lengths in (("q", q, queries), ("k", k, keys), ("v", v, keys)):
        expected = (lengths.total, *q.shape[1:])
        if x.ndim != 3 or tuple(x.shape) != expected:
            raise ValueError(
                f"block_attention: {name} has shape {tuple(x.shape)}, expected (tokens, heads, head_dim) = {expected}"
            )
        _check_device(name, x, lengths, q)
    if queries.num_seqs != keys.num_seqs:
        raise ValueError(
            f"block_attention: got {queries.num_seqs} query and {keys.num_seqs} key sequences, expected as many"
        )
    if queries.total == 0 or queries.num_seqs == 0:
        return torch.zeros_like(q) + 0 * (k.sum() + v.sum())  # the sum keeps k and v in the autograd graph
    implementation = choose("block_attention", q.device.type, q.dtype, q.shape[-1])
    return IMPLEMENTATIONS[implementation](q, k, v, queries, keys, q.shape[-1] ** -0.5 if scale is None else scale)


def block_attention_packed(qkv: Tensor, lengths: Ragged, *, scale: float | None = None) -> Tensor:
    """`block_attention` of q, k, v = qkv.unbind(1), as one linear layer writes them; the gradient is one tensor too.

    Args:
        qkv: [lengths.total, 3, heads, head_dim], any strides.
        lengths: lengths of the sequences.
        scale: factor on the scores; default: head_dim^-1/2.

    Returns:
        [lengths.total, heads, head_dim], qkv's dtype.

    Raises:
        ValueError: shapes or devices do not fit together.
    """
    if qkv.ndim != 4 or tuple(qkv.shape[:2]) != (lengths.total, 3):
        raise ValueError(
            f"block_attention_packed: qkv has shape {tuple(qkv.shape)}, "
            f"expected (tokens, 3, heads, head_dim) = ({lengths.total}, 3, ...)"
        )
    _check_device("qkv", qkv, lengths, qkv)
    q, k, v = qkv.unbind(1)
    implementation = choose("block_attention", qkv.device.type, qkv.dtype, qkv.shape[-1])
    if implementation not in _PACKED_IMPLEMENTATIONS or qkv.numel() == 0 or lengths.num_seqs == 0:
        return block_attention(q, k, v, lengths, scale=scale)
    scale = qkv.shape[-1] ** -0.5 if scale is None else scale
    return _PACKED_IMPLEMENTATIONS[implementation](qkv, lengths, scale)
