"""The gathers in Triton: values, gradients, ragged runs, nothing left unwritten, and the bytes that they move."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastjepa_kernels.masked_gather import gather_add, gather_patches, masked_gather
from fastjepa_kernels.reference import gather_add_reference, gather_patches_reference, masked_gather_reference
from tests.kernels.triton.conftest import (
    Engine,
    IdleKernel,
    compiled_only,
    interpreted_only,
    not_in_the_simulator,
    simulator_runs,
)
from tests.support.accuracy import assert_close_to_reference

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

pytestmark = pytest.mark.usefixtures("unwritten_memory_shows")


@pytest.fixture(autouse=True)
def same_numbers_in_every_run() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("op", ["gather_patches", "gather_rows", "sum_rows", "gather_add"])
def test_rows_that_a_kernel_left_out_would_show(engine: Engine, op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = import_module("fastjepa_kernels.triton_kernels.masked_gather")
    for kernel in ("_gather_patches_kernel", "_copy_rows_kernel", "_sum_runs_kernel", "_gather_add_kernel"):
        monkeypatch.setattr(module, kernel, IdleKernel())
    rows, indices = torch.zeros(3, 8, device=engine.device), torch.zeros(2, dtype=torch.int64, device=engine.device)
    calls: dict[str, Callable[[], Tensor]] = {
        "gather_patches": lambda: gather_patches(torch.zeros(1, 3, 4, 4, device=engine.device), None, 4),
        "gather_rows": lambda: masked_gather(rows, indices),
        "sum_rows": lambda: module.sum_rows(rows[:2], indices, 3),
        "gather_add": lambda: gather_add(rows[:2], rows, indices),
    }
    assert calls[op]().isnan().all()


def one_patch_of(larger: Tensor) -> Tensor:
    return larger[:, :, 1:17, 3:35]


PATCH_CASES = {
    "16 pixels, uint8 to bf16": (
        16,
        (torch.rand(2, 3, 32, 48) * 255).to(torch.uint8),
        torch.bfloat16,
        [5, 0, 11, 2, 2],
    ),
    "14 pixels, fp32 to bf16": (14, torch.rand(2, 3, 28, 42), torch.bfloat16, [11, 3, 4]),
    "14 pixels, all": (14, (torch.rand(1, 3, 28, 28) * 255).to(torch.uint8), torch.float32, None),
    "a crop": (8, one_patch_of(torch.rand(2, 3, 20, 40)), torch.float32, [15, 0, 7]),
    "channels last": (
        8,
        torch.rand(2, 3, 16, 24).contiguous(memory_format=torch.channels_last),
        torch.float16,
        [3, 11],
    ),
    "bf16 images": (16, torch.rand(1, 3, 32, 32).bfloat16(), torch.bfloat16, [3, 0]),
    "odd patches": (3, torch.rand(3, 3, 6, 9), torch.float32, list(range(18))[::-1]),
    "nothing kept": (4, torch.rand(1, 3, 4, 8), torch.float32, []),
}


@pytest.mark.parametrize("case", PATCH_CASES)
def test_kept_patches_are_read_and_normalised(engine: Engine, case: str) -> None:
    patch_size, images, dtype, kept = PATCH_CASES[case]
    indices = None if kept is None else torch.tensor(kept, dtype=torch.int64)
    num_patches = images.shape[0] * (images.shape[2] // patch_size) * (images.shape[3] // patch_size)
    rows = torch.arange(num_patches) if indices is None else indices
    on_device = None if indices is None else indices.to(engine.device)
    result = gather_patches(images.to(engine.device), on_device, patch_size, mean=MEAN, std=STD, dtype=dtype).cpu()
    plain, exact = (
        gather_patches_reference(images, rows, patch_size, MEAN, STD, wide) for wide in (torch.float32, torch.float64)
    )
    assert_close_to_reference(result, plain.to(dtype), exact)


def test_single_channel_images_without_normalisation_are_copied(engine: Engine) -> None:
    images = torch.randn(2, 1, 8, 8)
    result = gather_patches(images.to(engine.device), torch.tensor([6, 1], device=engine.device), 4).cpu()
    assert torch.equal(result, gather_patches_reference(images, torch.tensor([6, 1]), 4, [0.0], [1.0], torch.float32))


# (D, row stride): a power of two; blocks of columns; a last block that is not full; unaligned rows; parts of wider rows.
WIDTHS = [(64, 64), (384, 384), (40, 40), (5, 7), (96, 288)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
simulator_runs_one_width_per_dtype = simulator_runs(
    lambda width, dtype: (width, dtype) in [(384, torch.bfloat16), (5, torch.float32), (96, torch.float16)]
)


def rows_of(num_rows: int, width: int, stride: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(num_rows, stride).to(dtype)[:, stride - width :]


def assert_gather_and_gradient(engine: Engine, rows: Tensor, indices: Tensor, *, unique: bool = False) -> None:
    leaf = rows.to(engine.device).requires_grad_()
    out = masked_gather(leaf, indices.to(engine.device), unique=unique)
    assert torch.equal(out.cpu(), masked_gather_reference(rows, indices))
    upstream = torch.randn(out.shape).to(out.dtype)
    (grad,) = torch.autograd.grad(out, leaf, upstream.to(engine.device))
    plain, exact = (rows.to(dtype).requires_grad_() for dtype in (rows.dtype, torch.float64))
    truths = (
        torch.autograd.grad(masked_gather_reference(x, indices), x, upstream.to(x.dtype))[0] for x in (plain, exact)
    )
    assert_close_to_reference(grad.cpu(), *truths)


@simulator_runs_one_width_per_dtype
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "stride"), WIDTHS)
@pytest.mark.parametrize("unique", [True, False])
def test_rows_are_gathered_and_their_gradients_added(
    engine: Engine, width: int, stride: int, dtype: torch.dtype, unique: bool
) -> None:
    indices = torch.tensor([6, 0, 3, 2] if unique else [6, 0, 3, 3, 0, 3, 6, 3])  # rows 1, 4, 5 are not used
    assert_gather_and_gradient(engine, rows_of(7, width, stride, dtype), indices, unique=unique)


@simulator_runs(lambda runs: runs == [65, 127, 1, 128])
@pytest.mark.parametrize(
    "runs",
    [[64], [63, 1], [1, 64, 63], [65, 127, 1, 128], [0, 300, 0, 2], [40, 200]],
    ids=str,
)
def test_long_runs_are_added_by_chunks(engine: Engine, runs: list[int]) -> None:
    """Row r is used runs[r] times; a chunk has 64 entries."""
    indices = torch.arange(len(runs)).repeat_interleave(torch.tensor(runs))
    shuffled = indices[torch.randperm(len(indices), generator=torch.Generator().manual_seed(0))]
    assert_gather_and_gradient(engine, rows_of(len(runs), 32, 32, torch.float32), shuffled)


@pytest.mark.parametrize("unique", [True, False])
def test_nothing_gathered_gives_no_gradient(engine: Engine, unique: bool) -> None:
    rows = torch.randn(3, 8, device=engine.device, requires_grad=True)
    out = masked_gather(rows, torch.zeros(0, dtype=torch.int64, device=engine.device), unique=unique)
    assert out.shape == (0, 8)
    assert torch.equal(torch.autograd.grad(out.sum(), rows)[0].cpu(), torch.zeros(3, 8))


@pytest.mark.parametrize("unique", [True, False])
def test_an_expanded_upstream_gradient_is_accepted(engine: Engine, unique: bool) -> None:
    rows = torch.randn(3, 8, device=engine.device, requires_grad=True)
    out = masked_gather(rows, torch.tensor([2, 0], device=engine.device), unique=unique)
    (grad,) = torch.autograd.grad(out.sum(), rows)
    assert torch.equal(grad.cpu(), torch.tensor([1.0, 0.0, 1.0])[:, None].expand(3, 8))


@simulator_runs_one_width_per_dtype
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "stride"), WIDTHS)
def test_positions_are_added_and_the_gradient_passes_through(
    engine: Engine, width: int, stride: int, dtype: torch.dtype
) -> None:
    tokens, table = rows_of(5, width, stride, dtype), rows_of(3, width, stride, dtype)
    positions = torch.tensor([0, 2, 2, 1, 0])
    leaf = tokens.to(engine.device).requires_grad_()
    out = gather_add(leaf, table.to(engine.device), positions.to(engine.device))
    exact = gather_add_reference(tokens.double(), table.double(), positions)
    assert_close_to_reference(out.cpu(), gather_add_reference(tokens, table, positions), exact)
    upstream = torch.randn(out.shape).to(dtype).to(engine.device)
    assert torch.equal(torch.autograd.grad(out, leaf, upstream)[0], upstream)


def test_half_tokens_and_a_wide_table_make_a_wide_sum(engine: Engine) -> None:
    tokens, table = rows_of(5, 96, 96, torch.bfloat16), rows_of(3, 96, 96, torch.float32)
    positions = torch.tensor([0, 2, 2, 1, 0])
    leaf = tokens.to(engine.device).requires_grad_()
    out = gather_add(leaf, table.to(engine.device), positions.to(engine.device))
    assert torch.equal(out.cpu(), gather_add_reference(tokens, table, positions))
    upstream = torch.randn(out.shape)
    grad = torch.autograd.grad(out, leaf, upstream.to(engine.device))[0]
    assert torch.equal(grad.cpu(), upstream.bfloat16())


def test_no_tokens_have_no_positions(engine: Engine) -> None:
    empty = torch.zeros(0, dtype=torch.int64, device=engine.device)
    out = gather_add(torch.zeros(0, 8, device=engine.device), torch.zeros(3, 8, device=engine.device), empty)
    assert out.shape == (0, 8)


@not_in_the_simulator
@given(st.data())
@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_indices_and_strides_do(engine: Engine, data: st.DataObject) -> None:
    num_rows, width, gap = (data.draw(st.integers(low, high)) for low, high in ((1, 9), (1, 40), (0, 9)))
    indices = torch.tensor(data.draw(st.lists(st.integers(0, num_rows - 1), max_size=20)), dtype=torch.int64)
    unique = len(indices.unique()) == len(indices)
    assert_gather_and_gradient(engine, rows_of(num_rows, width, width + gap, torch.float32), indices, unique=unique)


def test_float64_images_are_refused(engine: Engine) -> None:
    images = torch.zeros(1, 3, 4, 4, dtype=torch.float64, device=engine.device)
    with pytest.raises(ValueError, match="expected no float64"):
        gather_patches(images, None, 2, dtype=torch.float32)


@interpreted_only  # the contracts do not depend on the engine
def test_the_operators_keep_pytorchs_contracts(engine: Engine) -> None:
    ops = import_module("fastjepa_kernels.triton_kernels.masked_gather")
    rows, indices = torch.randn(4, 8, dtype=torch.float64), torch.tensor([3, 0, 3])
    leaf = rows.clone().requires_grad_()
    for op, args in (
        (ops.gather_patches, (torch.rand(1, 3, 8, 8), indices, 4, [1.0] * 3, [0.0] * 3, torch.bfloat16)),
        (ops.gather_patches, (torch.rand(1, 3, 8, 8), None, 4, [1.0] * 3, [0.0] * 3, torch.float32)),
        (ops.gather_rows, (leaf, indices, False)),
        (ops.gather_rows, (leaf, indices[:2], True)),
        (ops.scatter_rows, (rows[:2], indices[:2], 5)),
        (ops.sum_rows, (rows[:3], indices, 5)),
        (ops.gather_add, (leaf, rows, torch.tensor([3, 0, 3, 1]))),
    ):
        torch.library.opcheck(op, args)
    assert torch.autograd.gradcheck(lambda x: masked_gather(x, indices), leaf)


# The simulator counts what a launch moves in sectors of 32 bytes. A row's index is read once per block of columns.


@pytest.fixture(params=["sm_80", "sm_90"])
def counts(request: pytest.FixtureRequest) -> Iterator[list[Any]]:
    from benchmarks.proofs.aot.launches import simulated

    with simulated(request.param) as launches:
        yield launches


def sectors(launch: Any) -> tuple[int, int]:
    return launch["global_sectors"]["load"], launch["global_sectors"]["store"]


@compiled_only
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_row_is_read_once_and_written_once(counts: list[Any], dtype: torch.dtype) -> None:
    tokens, width, blocks = 21, 768, 3
    rows, indices = torch.zeros(30, width, dtype=dtype, requires_grad=True), torch.randperm(30)[:tokens]
    row_sectors = width * dtype.itemsize // 32
    masked_gather(rows, indices, unique=True).backward(torch.zeros(tokens, width, dtype=dtype))
    gather_add(rows.detach()[:tokens], rows.detach(), indices)
    warps_per_row = 2 if dtype == torch.float32 else 1  # 16 bytes for each of 32 threads are 128 or 256 columns
    index_sectors = tokens * blocks * warps_per_row
    gather, scatter, add = counts
    assert sectors(gather) == sectors(scatter) == (tokens * row_sectors + index_sectors, tokens * row_sectors)
    assert sectors(add) == (2 * tokens * row_sectors + index_sectors, tokens * row_sectors)
    # Each thread moves 16 bytes, or there would be more requests.
    assert gather["global_requests"]["store"] == tokens * row_sectors // 16


@compiled_only
@pytest.mark.parametrize(
    ("source", "target", "sectors_per_line"),
    [
        (torch.float32, torch.float32, 2),
        (torch.bfloat16, torch.bfloat16, 1),
        (torch.uint8, torch.bfloat16, 1),  # half of it is used
    ],
)
def test_only_the_pixels_of_kept_patches_are_read(
    counts: list[Any], source: torch.dtype, target: torch.dtype, sectors_per_line: int
) -> None:
    images, kept = torch.zeros(1, 3, 16, 512, dtype=source), torch.arange(0, 32, 2)
    out = gather_patches(images, kept, 16, dtype=target)
    loads, stores = sectors(counts[0])
    lines = len(kept) * 3 * 16
    assert 0 < loads - lines * sectors_per_line <= 2 * len(kept)  # the indices
    assert stores == out.nbytes // 32
    assert counts[0]["global_requests"]["store"] == out.nbytes // 512  # 16 bytes for each thread
