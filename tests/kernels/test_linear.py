"""linear: each implementation against the formula in fp64."""

import pytest
import torch
import torch.nn.functional as F

from fastjepa_kernels import implementations, linear, request


@pytest.fixture(params=["onednn", "torch"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every implementation, also the one chosen with AVX-512 only: it is right, if not fast, on every CPU."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    if problem := implementations("linear", "cpu", torch.float32)[request.param]:
        pytest.skip(problem)
    return str(request.param)


@pytest.mark.parametrize("rows", [1, 600])  # PyTorch computes products as small as the first one
def test_values_and_gradients_are_those_of_the_formula(implementation: str, rows: int) -> None:
    request({"linear": implementation})
    try:
        generator = torch.Generator().manual_seed(0)
        inputs = [torch.randn(shape, generator=generator) for shape in ((rows, 256), (320, 256), (320,))]
        upstream = torch.randn(rows, 320, generator=generator)
        mine = [x.requires_grad_() for x in inputs]
        linear(*mine).backward(upstream)
        wide = [x.detach().double().requires_grad_() for x in inputs]
        expected = wide[0] @ wide[1].T + wide[2]
        expected.backward(upstream.double())
        torch.testing.assert_close(linear(*mine).double(), expected, rtol=1e-5, atol=1e-4)
        for a, b in zip(mine, wide, strict=True):
            assert a.grad is not None
            torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-5, atol=5e-4)
        with torch.no_grad():
            torch.testing.assert_close(linear(*mine).double(), expected, rtol=1e-5, atol=1e-4)
    finally:
        request({})


def test_only_inputs_that_require_a_gradient_get_one() -> None:
    x, weight, bias = torch.randn(600, 256), torch.randn(320, 256, requires_grad=True), torch.randn(320)
    linear(x, weight, bias).sum().backward()
    assert x.grad is None
    assert weight.grad is not None


def test_under_autocast_the_result_is_pytorchs() -> None:
    x, weight, bias = torch.randn(600, 256), torch.randn(320, 256), torch.randn(320)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))


@pytest.mark.parametrize("rows", [1, 600])
def test_the_gradient_of_a_weight_is_added_to_its_buffer(implementation: str, rows: int) -> None:
    """The buffer is the weight's .grad, to which autograd adds where oneDNN does not."""
    request({"linear": implementation})
    try:
        x, weight, bias = torch.randn(rows, 256), torch.randn(320, 256, requires_grad=True), torch.randn(320)
        weight.grad = buffer = torch.ones_like(weight)
        linear(x, weight, bias, buffer).sum().backward()
        assert weight.grad is buffer
        torch.testing.assert_close(buffer, 1 + x.sum(0).expand(320, 256), rtol=1e-4, atol=1e-3)
    finally:
        request({})


def test_a_buffer_that_is_no_longer_the_gradient_is_left_alone(implementation: str) -> None:
    request({"linear": implementation})
    try:
        weight = torch.randn(320, 256, requires_grad=True)
        buffer = torch.zeros(320, 256)
        linear(torch.ones(600, 256), weight, torch.zeros(320), buffer).sum().backward()
        assert not buffer.any()
        assert weight.grad is not None
        assert bool((weight.grad == 600).all())
    finally:
        request({})
