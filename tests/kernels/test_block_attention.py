"""block_attention: values and gradients of every implementation that runs on a CPU, against the plain twin in fp64."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fastjepa_kernels import OPERATIONS, Ragged, block_attention, block_attention_packed, implementations
from fastjepa_kernels import request as request_implementations
from fastjepa_kernels.block_attention import IMPLEMENTATIONS
from fastjepa_kernels.reference import block_attention_reference

# The numbers of (queries, keys) of every sequence.
CASES = {
    "equal": [(7, 7)] * 4,
    "ragged": [(5, 5), (9, 9), (1, 1), (5, 5), (12, 12)],
    "one token": [(1, 1)],
    "empty sequences": [(0, 0), (4, 4), (0, 0), (3, 3), (0, 0)],
    "fewer queries": [(2, 9), (3, 5), (0, 4), (2, 9)],
    "sorted": [(1, 1), (2, 2), (2, 2), (8, 8)],
}


Inputs = tuple[Tensor, Tensor, Tensor]


def _inputs(case: str, dtype: torch.dtype, head_dim: int = 24) -> tuple[Inputs, Ragged, Ragged]:
    generator = torch.Generator().manual_seed(0)
    queries, keys = (Ragged.from_lengths(torch.tensor(n)) for n in zip(*CASES[case], strict=True))
    q = torch.randn(queries.total, 2, head_dim, generator=generator, dtype=dtype)
    # k and v are views into the output of a fused projection: strided, as the models pass them.
    kv = torch.randn(keys.total, 2, 2, head_dim, generator=generator, dtype=dtype)
    k, v = kv.unbind(1)
    return (q.requires_grad_(), k.requires_grad_(), v.requires_grad_()), queries, keys


def _double(inputs: Inputs) -> Inputs:
    q, k, v = inputs
    return q.double(), k.double(), v.double()


@pytest.fixture
def no_requests() -> Iterator[None]:
    yield
    request_implementations({})


def test_every_listed_implementation_has_its_function() -> None:
    assert tuple(IMPLEMENTATIONS) == OPERATIONS["block_attention"]


@pytest.mark.parametrize("implementation", ["buckets", "padded"])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_equal_the_reference(case: str, implementation: str) -> None:
    inputs, queries, keys = _inputs(case, torch.float64)
    out = IMPLEMENTATIONS[implementation](*inputs, queries, keys, 0.3)
    expected = block_attention_reference(*inputs, queries, keys, 0.3)
    upstream = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    for mine, plain in zip(
        torch.autograd.grad(out, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(mine, plain, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("no_requests")
@pytest.mark.parametrize("lengths", [[7, 7, 7], [5, 9, 1, 5], [0, 4, 0], [0, 0]])
@pytest.mark.parametrize("implementation", ["buckets", "padded"])
def test_packed_projection_gives_what_its_parts_give(lengths: list[int], implementation: str) -> None:
    request_implementations({"block_attention": implementation})
    packed = Ragged.from_lengths(torch.tensor(lengths))
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(packed.total, 3, 2, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(packed.total, 2, 8, generator=generator, dtype=torch.float64)
    q, k, v = qkv.unbind(1)
    out, apart = block_attention_packed(qkv, packed), block_attention(q, k, v, packed)
    torch.testing.assert_close(out, apart, rtol=0, atol=1e-12)
    grads = (torch.autograd.grad(x, qkv, upstream)[0] for x in (out, apart))
    torch.testing.assert_close(*grads, rtol=0, atol=1e-12)


def test_gradients_equal_finite_differences() -> None:
    lengths = Ragged.from_lengths(torch.tensor([3, 0, 5, 3]))
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(lengths.total, 3, 1, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: block_attention_packed(x, lengths), qkv)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_at_most_twice_that_of_plain_pytorch(dtype: torch.dtype) -> None:
    inputs, queries, keys = _inputs("ragged", dtype, head_dim=64)
    exact = block_attention_reference(*_double(inputs), queries, keys, 64**-0.5)
    plain = block_attention_reference(*inputs, queries, keys, 64**-0.5)
    error = (block_attention(*inputs, queries, keys).double() - exact).abs().max()
    assert error <= 2 * (plain.double() - exact).abs().max() + torch.finfo(dtype).eps


def test_no_query_at_all_gives_an_empty_result_and_zero_gradients() -> None:
    none, some = Ragged.from_lengths(torch.tensor([0, 0])), Ragged.from_lengths(torch.tensor([3, 1]))
    q = torch.zeros(0, 2, 8, requires_grad=True)
    k, v = (torch.randn(4, 2, 8, requires_grad=True) for _ in range(2))
    out = block_attention(q, k, v, none, some)
    assert out.shape == (0, 2, 8)
    out.sum().backward()
    assert k.grad is not None
    assert not k.grad.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q[:-1], k, v), "q has shape"),
        (lambda q, k, v: (q, k[:, :1], v), "k has shape"),
        (lambda q, k, v: (q, k, v.double()), r"v \(torch.float64"),
    ],
)
def test_inputs_that_do_not_fit_together_are_refused_by_name(change: object, message: str) -> None:
    inputs, queries, keys = _inputs("ragged", torch.float32)
    assert callable(change)
    q, k, v = change(*inputs)
    with pytest.raises(ValueError, match=message):
        block_attention(q, k, v, queries, keys)


def test_a_packed_projection_of_another_shape_is_refused() -> None:
    lengths = Ragged.from_lengths(torch.tensor([2, 3]))
    expected = r"qkv has shape \(5, 2, 4, 8\), expected \(tokens, 3, heads, head_dim\) = \(5, 3, ...\)"
    with pytest.raises(ValueError, match=expected):
        block_attention_packed(torch.zeros(5, 2, 4, 8), lengths)


@pytest.mark.gpu
@pytest.mark.usefixtures("no_requests")
@pytest.mark.parametrize("implementation", ["triton", "varlen", "padded", "xformers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_gpu_implementations_equal_the_reference_without_waiting(
    case: str, dtype: torch.dtype, implementation: str
) -> None:
    problem = implementations("block_attention", "cuda", dtype, 64)[implementation]
    if problem:
        pytest.skip(problem)
    request_implementations({"block_attention": implementation})
    inputs, queries, keys = _inputs(case, dtype, head_dim=64)
    exact = block_attention_reference(*_double(inputs), queries, keys, 64**-0.5)
    device = torch.device("cuda")
    torch.cuda.set_sync_debug_mode("error")  # a host-device synchronisation in the step is a defect
    try:
        q, k, v = (x.detach().to(device, non_blocking=True) for x in inputs)
        out = block_attention(q, k, v, queries.to(device), keys.to(device))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out.cpu().double(), exact, rtol=tolerance, atol=tolerance)
