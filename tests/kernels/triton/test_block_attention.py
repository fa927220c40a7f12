"""Attention in Triton: values and gradients against fp64, ragged and degenerate lengths, addresses and launches."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

import fastjepa_kernels.triton_kernels.block_attention as triton_attention
from fastjepa_kernels import Ragged
from fastjepa_kernels.block_attention import block_attention, block_attention_packed
from fastjepa_kernels.reference import block_attention_reference
from tests.kernels.triton.conftest import (
    Engine,
    IdleKernel,
    compiled_only,
    interpreted_only,
    only_cases,
    simulator_runs,
)
from tests.support.accuracy import RAGGED_LENGTHS, assert_close_to_reference

pytestmark = pytest.mark.usefixtures("unwritten_memory_shows")


def ragged(lengths: Sequence[int]) -> Ragged:
    return Ragged.from_lengths(torch.tensor(lengths, dtype=torch.int64))


def normal(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def differentiated(
    attend: Callable[..., Tensor], inputs: Sequence[Tensor], d_out: Tensor, device: torch.device
) -> list[Tensor]:
    """The output and the gradient of every input."""
    leaves = [x.detach().to(device).requires_grad_() for x in inputs]
    out = attend(*leaves)
    grads = torch.autograd.grad(out, leaves, d_out.to(out.device, out.dtype))
    return [x.cpu() for x in (out.detach(), *grads)]


def check(
    engine: Engine,
    queries: Ragged,
    keys: Ragged,
    inputs: Sequence[Tensor],
    *,
    scale: float | None = None,
    d_out: Tensor | None = None,
) -> None:
    """Hold out, d_q, d_k and d_v to the error of plain PyTorch in the same dtype, all against fp64."""

    def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return block_attention_reference(q, k, v, queries, keys, q.shape[-1] ** -0.5 if scale is None else scale)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return block_attention(q, k, v, queries.to(engine.device), keys.to(engine.device), scale=scale)

    cpu = torch.device("cpu")
    d_out = normal(*inputs[0].shape, dtype=inputs[0].dtype, seed=9) if d_out is None else d_out
    results = differentiated(attend, inputs, d_out, engine.device)
    plain = differentiated(reference, inputs, d_out, cpu)
    exact = differentiated(reference, [x.double() for x in inputs], d_out, cpu)
    for result, same_dtype, wanted in zip(results, plain, exact, strict=True):
        assert_close_to_reference(result, same_dtype, wanted)


def random_inputs(
    queries: Ragged, keys: Ragged, head_dim: int, dtype: torch.dtype = torch.bfloat16, heads: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    q = normal(queries.total, heads, head_dim, dtype=dtype, seed=1)
    k, v = (normal(keys.total, heads, head_dim, dtype=dtype, seed=seed) for seed in (2, 3))
    return q, k, v


LENGTHS = {name: lengths for name, lengths in RAGGED_LENGTHS.items() if sum(lengths)}
LENGTHS["longer than a program takes whole"] = [5, 131, 0, 1]


@simulator_runs(lambda case: case not in ("one sequence", "equal", "around a block"))
@pytest.mark.parametrize("case", LENGTHS)
def test_ragged_sequences(engine: Engine, case: str) -> None:
    lengths = ragged(LENGTHS[case])
    check(engine, lengths, lengths, random_inputs(lengths, lengths, 32))


# No model has head dims of 8 and 40: the smallest, and one whose second tile of 16 columns holds 8.
HALF = [(head_dim, torch.bfloat16) for head_dim in (8, 24, 32, 40, 64, 80, 88, 128)] + [(80, torch.float16)]
SINGLE = [(24, torch.float32), (80, torch.float32)]


# The tiles of a head are the same in all kernels, so few head dims get a sequence too long to be taken whole.
@only_cases(lambda longest, head_dim, dtype: longest == 19 or (head_dim, dtype) in [(80, torch.bfloat16), *SINGLE[1:]])
@simulator_runs(lambda head_dim, dtype: (head_dim, dtype) in [*HALF[5:7], HALF[-1], SINGLE[0]])
@pytest.mark.parametrize(("head_dim", "dtype"), HALF + SINGLE)
@pytest.mark.parametrize("longest", [19, 129])
def test_head_dims_and_dtypes(engine: Engine, longest: int, head_dim: int, dtype: torch.dtype) -> None:
    lengths = ragged([3, longest])
    check(engine, lengths, lengths, random_inputs(lengths, lengths, head_dim, dtype, heads=1))


@simulator_runs(lambda queries: len(queries) != 2)
@pytest.mark.parametrize(
    ("queries", "keys"),
    [([2, 3, 0, 2, 4], [9, 33, 4, 0, 4]), ([40, 1], [3, 20]), ([3, 0, 35, 2], [140, 3, 36, 0])],
    ids=["fewer", "more", "tiled"],
)
def test_queries_that_are_not_the_keys(engine: Engine, queries: list[int], keys: list[int]) -> None:
    few, many = ragged(queries), ragged(keys)
    check(engine, few, many, random_inputs(few, many, 24, heads=1))


@pytest.mark.parametrize("longest", [33, 129])
def test_packed_projection_and_its_single_gradient(engine: Engine, longest: int) -> None:
    """The results equal those of the operation on q, k and v, bit for bit."""
    lengths = ragged([7, 0, longest])
    qkv = normal(lengths.total, 3, 1, 24, dtype=torch.bfloat16, seed=0)
    d_out = normal(lengths.total, 1, 24, dtype=torch.bfloat16, seed=9)

    def attend(qkv: Tensor) -> Tensor:
        return block_attention_packed(qkv, lengths.to(engine.device))

    out, d_qkv = differentiated(attend, [qkv], d_out, engine.device)
    q, k, v = qkv.unbind(1)

    def attend_apart(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return block_attention(q, k, v, lengths.to(engine.device))

    apart = differentiated(attend_apart, [q, k, v], d_out, engine.device)
    torch.testing.assert_close(out, apart[0], rtol=0, atol=0)
    torch.testing.assert_close(d_qkv, torch.stack(apart[1:], 1), rtol=0, atol=0)


def _every_second_column(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, -1)[..., ::2]


def _heads_first(x: Tensor) -> Tensor:
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def _rows_of_odd_stride(x: Tensor) -> Tensor:
    wide = torch.zeros(len(x), x[0].numel() + 3, dtype=x.dtype)
    wide[:, 1:-2] = x.flatten(1)
    return wide[:, 1:-2].unflatten(1, x.shape[1:])


@simulator_runs(lambda lay_out: lay_out is _rows_of_odd_stride)  # the others are copied before the kernels see them
@pytest.mark.parametrize("lay_out", [_every_second_column, _heads_first, _rows_of_odd_stride])
def test_any_strides(engine: Engine, lay_out: Callable[[Tensor], Tensor]) -> None:
    lengths = ragged([5, 18])
    inputs = [lay_out(x) for x in random_inputs(lengths, lengths, 24)]
    assert not any(x.is_contiguous() for x in inputs)
    d_out = lay_out(normal(lengths.total, 2, 24, dtype=torch.bfloat16, seed=9))
    check(engine, lengths, lengths, inputs, d_out=d_out)


@pytest.mark.parametrize("longest", [12, 130])
def test_scores_far_below_zero_leave_no_trace_of_missing_keys(engine: Engine, longest: int) -> None:
    """A key past the end scores 0, and next to an lse of -300 its exp would be infinite."""
    lengths = ragged([3, longest])
    q, k, v = random_inputs(lengths, lengths, 16, heads=1)
    check(engine, lengths, lengths, (q.abs() + 3, -k.abs() - 3, v), scale=2.0)


@pytest.mark.parametrize("longest", [12, 130])
def test_lse_is_the_base_2_logarithm_of_the_sum(engine: Engine, longest: int) -> None:
    lengths = ragged([0, longest, 2])
    q, k, v = random_inputs(lengths, lengths, 16, torch.float32)
    on_device = lengths.to(engine.device)
    q_there, k_there, v_there = (x.to(engine.device) for x in (q, k, v))
    lse = triton_attention._forward(q_there, k_there, v_there, on_device, on_device, 0.2)[1].cpu()
    for start, end in ((0, longest), (longest, longest + 2)):
        scores = torch.einsum("qhd,khd->hqk", q[start:end].double(), k[start:end].double()) * 0.2
        torch.testing.assert_close(lse[:, start:end].double(), scores.logsumexp(-1) / math.log(2), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("longest", [12, 130])
def test_rows_after_the_last_sequence_get_zeros_and_are_not_read(engine: Engine, longest: int) -> None:
    queries, keys = ragged([4, 0, 7]), ragged([longest, 2, 7])
    inputs = random_inputs(queries, keys, 16, heads=1)
    d_out = normal(queries.total, 1, 16, dtype=torch.bfloat16, seed=9)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bounds = (
            Ragged(x.cu_seqlens, x.max_seqlen, n).to(engine.device) for x, n in ((queries, len(q)), (keys, len(k)))
        )
        return block_attention(q, k, v, *bounds, scale=0.2)

    def longer(x: Tensor) -> Tensor:
        return torch.cat([x, x.new_full((70, *x.shape[1:]), float("nan"))])

    expected = differentiated(attend, inputs, d_out, engine.device)
    results = differentiated(attend, [longer(x) for x in inputs], longer(d_out), engine.device)
    for result, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(result[: len(wanted)], wanted, rtol=0, atol=0)
        assert not result[len(wanted) :].any()


def test_a_sequence_does_not_see_its_neighbours(engine: Engine) -> None:
    lengths = ragged([5, 3, 9])
    inputs = random_inputs(lengths, lengths, 16, heads=1)
    for x in inputs:
        x[5:8] = float("nan")
    d_out = normal(lengths.total, 1, 16, dtype=torch.bfloat16, seed=9)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return block_attention(q, k, v, lengths.to(engine.device))

    for result in differentiated(attend, inputs, d_out, engine.device):
        assert result[5:8].isnan().all()
        assert result[:5].isfinite().all()
        assert result[8:].isfinite().all()


@interpreted_only
def test_rows_that_a_kernel_left_out_would_show(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = ragged([4])
    inputs = random_inputs(lengths, lengths, 16, heads=1)
    d_out = normal(4, 1, 16, dtype=torch.bfloat16, seed=9)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return block_attention(q, k, v, lengths)

    for kernel in ("_attend_whole_kernel", "_backward_whole"):
        monkeypatch.setattr(triton_attention, kernel, IdleKernel())
    for result in differentiated(attend, inputs, d_out, engine.device):
        assert result.isnan().all()


@interpreted_only
def test_no_sequence_at_all_gives_zeros(engine: Engine) -> None:
    nothing = Ragged(torch.zeros(1, dtype=torch.int32), 0, 3)
    qkv = torch.ones(3, 3, 2, 8, requires_grad=True)
    out = block_attention_packed(qkv, nothing)
    assert not out.any()
    assert not torch.autograd.grad(out.sum(), qkv)[0].any()


@only_cases(lambda engine: engine.startswith("sm_"))  # the interpreter copies whole tensors, a GPU takes gigabytes
def test_rows_past_two_to_the_31_elements_are_found(engine: Engine) -> None:
    first, length, heads, head_dim, stride = 136, 3, 2, 16, 2**24 - 8  # the largest stride that is not copied
    assert first * stride > 2**31
    rows = first + length
    # Reserve 4.7 GB of addresses, of which only the rows below are ever touched.
    no_reserve = 0x4000  # Linux's MAP_NORESERVE
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    memory = torch.frombuffer(mmap.mmap(-1, 2 * rows * stride, flags=flags), dtype=torch.bfloat16)
    qkv = memory.as_strided((rows, 3, heads, head_dim), (stride, heads * head_dim, head_dim, 1))
    close = normal(length, 3, heads, head_dim, dtype=torch.bfloat16, seed=0)
    qkv[first:] = close
    d_out = normal(rows, heads, head_dim, dtype=torch.bfloat16, seed=9)
    far = Ragged(torch.tensor([first, rows], dtype=torch.int32), length, rows)

    def attend(lengths: Ragged) -> Callable[..., Tensor]:
        return lambda q, k, v: block_attention(q, k, v, lengths)

    results = differentiated(attend(far), qkv.unbind(1), d_out, engine.device)
    expected = differentiated(attend(ragged([length])), close.unbind(1), d_out[first:], engine.device)
    for result, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(result[first:], wanted, rtol=0, atol=0)


@compiled_only
@pytest.mark.parametrize("longest", [100, 1024])
def test_launches_for_many_sequences_stay_within_the_limits_of_a_grid(longest: int) -> None:
    from benchmarks.proofs.aot.launches import recorded

    num_seqs, heads = 4096, 16
    # The stored lengths are 0, so that nothing runs; grids come from the bounds.
    lengths = Ragged(torch.zeros(num_seqs + 1, dtype=torch.int32), longest, 1)
    qkv = torch.zeros(1, 3, heads, 64, dtype=torch.bfloat16, requires_grad=True)
    with recorded("sm_80") as launches:
        block_attention_packed(qkv, lengths).sum().backward()
    attention = [launch for launch in launches if launch.name != "_delta_kernel"]
    assert len(attention) == (2 if triton_attention.takes_whole(longest, 64, torch.bfloat16) else 3)
    for launch in attention:
        rows = launch.constexprs["KEYS" if launch.name == "_backward_keys_kernel" else "QUERIES"]
        blocks = 1 if triton_attention.takes_whole(longest, 64, torch.bfloat16) else math.ceil(longest / rows)
        assert launch.grid == (heads * blocks, num_seqs, 1)
        assert max(launch.grid[1:]) <= 65_535


@compiled_only
def test_results_cannot_depend_on_the_order_of_programs() -> None:
    """There are no atomics, and no two programs write the same row, or the other tests would see sums missing."""
    from benchmarks.proofs.aot.launches import recorded

    names = set()
    for longest in (100, 200):
        qkv = torch.zeros(longest, 3, 2, 64, dtype=torch.bfloat16, requires_grad=True)
        with recorded("sm_90", all_configs=True) as launches:
            block_attention_packed(qkv, ragged([longest])).sum().backward()
        for launch in launches:
            names.add(launch.name)
            assert "atom" not in launch.kernel.asm["ptx"]
            assert "red." not in launch.kernel.asm["ptx"].replace("shared.", "")
    assert len(names) == 5


@pytest.mark.gpu
@pytest.mark.parametrize("longest", [100, 300])
def test_two_runs_give_the_same_bits(longest: int) -> None:
    cuda = torch.device("cuda")
    lengths = ragged([longest, 20, 77] * 50)
    qkv = normal(lengths.total, 3, 12, 64, dtype=torch.bfloat16, seed=0)
    d_out = normal(lengths.total, 12, 64, dtype=torch.bfloat16, seed=9)
    lengths = lengths.to(cuda)
    first, second = (differentiated(lambda x: block_attention_packed(x, lengths), [qkv], d_out, cuda) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@interpreted_only
def test_the_operators_keep_pytorchs_contracts(engine: Engine) -> None:
    lengths = ragged([2, 3])
    numbers = lengths.max_seqlen, 0.2
    cu_seqlens = lengths.cu_seqlens
    q, k, v = (x.requires_grad_() for x in random_inputs(lengths, lengths, 16, torch.float32, heads=1))
    qkv = torch.stack([q, k, v], 1).detach().requires_grad_()
    ops = torch.ops.fastjepa
    torch.library.opcheck(ops.block_attention, (q, k, v, cu_seqlens, cu_seqlens, numbers[0], *numbers))
    torch.library.opcheck(ops.block_attention_packed, (qkv, cu_seqlens, *numbers))
    with torch.no_grad():
        out, lse = ops.block_attention_packed(qkv, cu_seqlens, *numbers)
        d_out = torch.ones_like(out)
    saved = [x.detach() for x in (q, k, v, out, lse, d_out)]
    torch.library.opcheck(ops.block_attention_backward, (*saved, cu_seqlens, cu_seqlens, numbers[0], *numbers))
    torch.library.opcheck(ops.block_attention_packed_backward, (qkv.detach(), out, lse, d_out, cu_seqlens, *numbers))


@interpreted_only
def test_more_sequences_than_a_grid_takes_are_refused(engine: Engine) -> None:
    lengths = Ragged(torch.zeros(65_537, dtype=torch.int32), 1, 1)
    with pytest.raises(ValueError, match="got 65,536 sequences, expected at most 65,535"):
        block_attention_packed(torch.zeros(1, 3, 2, 8), lengths)


@compiled_only
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_every_tensor_crosses_memory_once(target: str) -> None:
    """A sequence of ViT-B's width moves the bytes of the formula, in full sectors."""
    from benchmarks.proofs.aot.launches import simulated

    tokens, heads, width = 92, 2, 64
    lengths = Ragged.uniform(1, tokens)
    qkv = torch.randn(tokens, 3, heads, width).bfloat16().requires_grad_()
    tensor, statistics = tokens * heads * width * 2, tokens * heads * 4
    with simulated(target) as launches:
        out = block_attention_packed(qkv, lengths)
        forward = launches.pop()
        out.backward(torch.randn_like(out))
        backward = launches.pop()
        assert not launches
    scalars = heads * 8 * 6  # sectors of the lengths, which every warp of a program reads
    for counts, loaded, stored in (
        (forward, 3 * tensor, tensor + statistics),
        (backward, 4 * tensor + 32 * statistics, 3 * tensor),  # every warp reads the log-sum-exps again, from L1
    ):
        assert counts["useful_bytes"]["store"] == stored
        # A block of log-sum-exps may begin and end within a sector.
        assert stored <= 32 * counts["global_sectors"]["store"] <= stored + 32 * heads * 4
        assert counts["useful_bytes"]["load"] >= loaded - 32 * statistics
        assert counts["global_sectors"]["load"] <= loaded / 32 + scalars
        assert counts["smem_wavefronts"] == counts["smem_ideal"], "bank conflicts"


@compiled_only
def test_thousands_of_sequences_of_which_half_are_empty() -> None:
    from benchmarks.proofs.aot.launches import simulated

    lengths = Ragged.from_lengths(torch.tensor([1, 0, 2, 0]).repeat(1024))
    qkv = torch.randn(lengths.total, 3, 1, 16).bfloat16().requires_grad_()
    upstream = torch.randn(lengths.total, 1, 16).bfloat16()
    with simulated("sm_90"):
        out = block_attention_packed(qkv, lengths)
        (gradient,) = torch.autograd.grad(out, qkv, upstream)
    results = []
    for dtype in (torch.bfloat16, torch.float64):
        twin = qkv.detach().to(dtype).requires_grad_()
        q, k, v = twin.unbind(1)
        plain = block_attention_reference(q, k, v, lengths, lengths, 0.25)
        results.append((plain.detach(), *torch.autograd.grad(plain, twin, upstream.to(dtype))))
    for mine, same_dtype, exact in zip((out.detach(), gradient), *results, strict=True):
        assert_close_to_reference(mine, same_dtype, exact)
