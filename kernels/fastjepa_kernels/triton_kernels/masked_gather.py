"""Gathers by packed index: pixels of kept patches, rows of tokens, rows of a position table (Triton).

    gather_patches  out[t, (c, y, x)] = scale_c * images[b, c, p * row + y, p * column + x] + shift_c
                    with (b, row, column) = indices[t] by B, H / p, W / p
    gather_rows     out[t] = rows[indices[t]];   d rows[r] = sum of d out[t] over t with indices[t] = r
    gather_add      out[t] = tokens[t] + table[positions[t]];   d tokens = d out

All kernels are bound by memory bandwidth. Every program copies a tile of rows by `COLS` columns. Widths and row strides are
compile-time constants, so that the compiler can prove that rows are aligned, and moves 16 bytes per thread.

**What limits gather_patches.** A patch is C * p runs of p pixels. At p = 16 a run of bf16 is one 32-byte sector, so nothing
is read in vain; a run of uint8 is half a sector. At p = 14 runs begin at multiples of 14 pixels, so the widest aligned load
is 2 pixels (4 bytes of bf16, 2 of uint8), and a run of bf16 touches 1.75 sectors on average: twice the bytes. Rows of 588
bf16 values are aligned to 8 bytes only, which is the width of the stores. Pixels in NHWC order (3 bytes apart) are read one
by one, after the first channel from the L1 cache.

**The sum over repeated indices** needs no atomics. The indices are sorted (stable), so that each row's entries form a run.
Runs may be very long, since every target block that covers a position uses its row, hence two levels. The sorted list is cut
into chunks of 64 entries. Chunks that lie within one run are summed on their own, and each row then adds its loose entries
and its chunks. A row that is used T times costs its program T / 64 steps, not T. Everything is added in a fixed order, in
fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastjepa_kernels.triton_kernels import one_if_interpreted

_CHUNK = 64


def columns(width: int) -> int:
    """The number of columns of a tile: the widest choice that leaves at most an eighth of the lanes idle."""
    return next((c for c in (256, 128, 64) if triton.cdiv(width, c) * c <= 1.125 * width), 32)


# A tile has at least 16 elements for each thread: 16 bytes of uint8.
_TILES = one_if_interpreted(
    [triton.Config({"TILE": tile}, num_warps=warps) for tile, warps in ((2048, 4), (1024, 2), (4096, 4), (4096, 8))]
)


@triton.autotune(configs=_TILES, key=["PATCH", "CHANNELS"])
@triton.jit(do_not_specialize=["num_tokens"])
def _gather_patches_kernel(
    p_images,
    p_indices,
    p_out,
    num_tokens,
    s_image,
    s_channel,
    s_y,
    s_x,
    SCALE: tl.constexpr,
    SHIFT: tl.constexpr,
    CHANNELS: tl.constexpr,
    PATCH: tl.constexpr,
    GRID_W: tl.constexpr,
    NUM_PATCHES: tl.constexpr,
    PIXELS: tl.constexpr,
    TILE: tl.constexpr,
):
    ROWS: tl.constexpr = max(1, TILE // PIXELS)
    o_out = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    m_out = o_out < num_tokens
    patch = o_out if p_indices is None else tl.load(p_indices + o_out, mask=m_out, other=0)
    o_patch = (
        patch // NUM_PATCHES * s_image + patch % NUM_PATCHES // GRID_W * PATCH * s_y + patch % GRID_W * PATCH * s_x
    )
    o_pixel = tl.arange(0, PIXELS)  # [PIXELS], of one channel
    mask = m_out[:, None] & (o_pixel < PATCH * PATCH)[None, :]
    o_in = (o_pixel // PATCH).to(tl.int64) * s_y + (o_pixel % PATCH).to(tl.int64) * s_x
    p_in = p_images + o_patch[:, None] + o_in[None, :]  # [ROWS, PIXELS]
    p_to = p_out + o_out[:, None] * (CHANNELS * PATCH * PATCH) + o_pixel[None, :]
    for channel in tl.static_range(CHANNELS):
        x = tl.load(p_in, mask=mask, other=0).to(tl.float32)
        x = x * SCALE[channel] + SHIFT[channel]
        tl.store(p_to, x.to(p_out.dtype.element_ty), mask=mask)
        p_in += s_channel
        p_to += PATCH * PATCH


@triton.autotune(configs=_TILES, key=["WIDTH"])
@triton.jit(do_not_specialize=["num_tokens"])
def _copy_rows_kernel(
    p_in,
    p_out,
    p_from,
    p_to,
    num_tokens,
    S_IN: tl.constexpr,
    S_OUT: tl.constexpr,
    WIDTH: tl.constexpr,
    COLS: tl.constexpr,
    TILE: tl.constexpr,
):
    """out[to[t]] = in[from[t]], where from or to is t itself if its pointer is None."""
    ROWS: tl.constexpr = TILE // COLS
    o_token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    m_token = o_token < num_tokens
    o_in = o_token if p_from is None else tl.load(p_from + o_token, mask=m_token, other=0)
    o_out = o_token if p_to is None else tl.load(p_to + o_token, mask=m_token, other=0)
    o_col = tl.program_id(1).to(tl.int64) * COLS + tl.arange(0, COLS)  # [COLS]
    mask = m_token[:, None] & (o_col < WIDTH)[None, :]
    x = tl.load(p_in + o_in[:, None] * S_IN + o_col[None, :], mask=mask, other=0)
    tl.store(p_out + o_out[:, None] * S_OUT + o_col[None, :], x, mask=mask)


@triton.autotune(configs=_TILES, key=["WIDTH"])
@triton.jit(do_not_specialize=["num_tokens"])
def _gather_add_kernel(
    p_tokens,
    p_table,
    p_positions,
    p_out,
    num_tokens,
    S_TOKENS: tl.constexpr,
    S_TABLE: tl.constexpr,
    WIDTH: tl.constexpr,
    COLS: tl.constexpr,
    TILE: tl.constexpr,
):
    ROWS: tl.constexpr = TILE // COLS
    o_token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    m_token = o_token < num_tokens
    o_table = tl.load(p_positions + o_token, mask=m_token, other=0)
    o_col = tl.program_id(1).to(tl.int64) * COLS + tl.arange(0, COLS)  # [COLS]
    mask = m_token[:, None] & (o_col < WIDTH)[None, :]
    x = tl.load(p_tokens + o_token[:, None] * S_TOKENS + o_col[None, :], mask=mask, other=0)
    y = tl.load(p_table + o_table[:, None] * S_TABLE + o_col[None, :], mask=mask, other=0)
    wide = _accumulator(p_out.dtype.element_ty)
    total = x.to(wide) + y.to(wide)
    tl.store(p_out + o_token[:, None] * WIDTH + o_col[None, :], total.to(p_out.dtype.element_ty), mask=mask)


@triton.constexpr_function
def _accumulator(dtype: tl.dtype) -> tl.dtype:
    return tl.float64 if dtype == tl.float64 else tl.float32


@triton.jit
def _add_rows(total, p_in, p_order, begin, end, o_col, m_col, S_IN: tl.constexpr, ROWS: tl.constexpr):
    """total [ROWS, COLS] + the rows in[order[begin:end]], ROWS at a time; the rows in[begin:end] if p_order is None."""
    for first in range(begin, end, ROWS):
        o_entry = first + tl.arange(0, ROWS)
        m_entry = o_entry < end
        o_in = o_entry if p_order is None else tl.load(p_order + o_entry, mask=m_entry, other=0)
        mask = m_entry[:, None] & m_col[None, :]
        x = tl.load(p_in + o_in[:, None] * S_IN + o_col[None, :], mask=mask, other=0)
        total += x.to(total.dtype)
    return total


@triton.jit
def _sum_chunks_kernel(
    p_in,
    p_sorted,
    p_order,
    p_chunks,
    S_IN: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    COLS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """chunks[i] = sum of the entries [i * CHUNK, (i + 1) * CHUNK) of the sorted list, if all of them belong to one row."""
    chunk = tl.program_id(0).to(tl.int64)
    begin = chunk * CHUNK
    if tl.load(p_sorted + begin) == tl.load(p_sorted + begin + CHUNK - 1):
        o_col = tl.program_id(1).to(tl.int64) * COLS + tl.arange(0, COLS)  # [COLS]
        m_col = o_col < WIDTH
        total = tl.zeros([ROWS, COLS], p_chunks.dtype.element_ty)
        total = _add_rows(total, p_in, p_order, begin, begin + CHUNK, o_col, m_col, S_IN, ROWS)
        tl.store(p_chunks + chunk * WIDTH + o_col, tl.sum(total, 0), mask=m_col)


@triton.jit
def _sum_runs_kernel(
    p_in,
    p_order,
    p_offsets,
    p_chunks,
    p_out,
    S_IN: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    COLS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """out[r] = sum of the entries [offsets[r], offsets[r + 1]) of the sorted list, in whole chunks where there are any."""
    row = tl.program_id(0).to(tl.int64)
    o_col = tl.program_id(1).to(tl.int64) * COLS + tl.arange(0, COLS)  # [COLS]
    m_col = o_col < WIDTH
    begin, end = tl.load(p_offsets + row), tl.load(p_offsets + row + 1)
    first_chunk, last_chunk = tl.cdiv(begin, CHUNK), end // CHUNK  # there is no whole chunk if last <= first
    head = tl.minimum(first_chunk * CHUNK, end)
    tail = tl.maximum(last_chunk * CHUNK, head)
    total = tl.zeros([ROWS, COLS], p_chunks.dtype.element_ty)
    total = _add_rows(total, p_in, p_order, begin, head, o_col, m_col, S_IN, ROWS)
    total = _add_rows(total, p_chunks, None, first_chunk, last_chunk, o_col, m_col, WIDTH, ROWS)
    total = _add_rows(total, p_in, p_order, tail, end, o_col, m_col, S_IN, ROWS)
    tl.store(p_out + row * WIDTH + o_col, tl.sum(total, 0).to(p_out.dtype.element_ty), mask=m_col)


def _tile_grid(num_tokens: int, width: int) -> Any:
    return lambda meta: (triton.cdiv(num_tokens, meta["TILE"] // meta["COLS"]), triton.cdiv(width, meta["COLS"]))


def rows_contiguous(x: Tensor) -> Tensor:
    """x with contiguous rows, for gradients, whose strides autograd chooses (a sum's gradient is expanded: strides 0)."""
    return x if x.stride(-1) == 1 else x.contiguous()


@torch.library.custom_op("fastjepa::gather_patches", mutates_args=())
def gather_patches(
    images: Tensor,
    indices: Tensor | None,
    patch_size: int,
    scale: Sequence[float],
    shift: Sequence[float],
    dtype: torch.dtype,
) -> Tensor:
    """Gather scale * pixel + shift, by channel."""
    if torch.float64 in (images.dtype, dtype):
        raise ValueError(
            f"gather_patches: got {images.dtype} images and result {dtype}, expected no float64: Triton computes in float32"
        )
    out = _empty_patches(images, indices, patch_size, scale, shift, dtype)
    if out.numel():
        grid_h, grid_w = images.shape[2] // patch_size, images.shape[3] // patch_size
        _gather_patches_kernel[lambda meta: (triton.cdiv(len(out), max(1, meta["TILE"] // meta["PIXELS"])),)](
            images,
            indices,
            out,
            len(out),
            *images.stride(),
            SCALE=tuple(scale),
            SHIFT=tuple(shift),
            CHANNELS=images.shape[1],
            PATCH=patch_size,
            GRID_W=grid_w,
            NUM_PATCHES=grid_h * grid_w,
            PIXELS=triton.next_power_of_2(patch_size**2),
        )
    return out


@gather_patches.register_fake
def _empty_patches(
    images: Tensor,
    indices: Tensor | None,
    patch_size: int,
    scale: Sequence[float],
    shift: Sequence[float],
    dtype: torch.dtype,
) -> Tensor:
    b, c, h, w = images.shape
    num_tokens = b * (h // patch_size) * (w // patch_size) if indices is None else indices.shape[0]
    return images.new_empty(num_tokens, c * patch_size**2, dtype=dtype)


@torch.library.custom_op("fastjepa::gather_rows", mutates_args=())
def gather_rows(rows: Tensor, indices: Tensor, unique: bool) -> Tensor:
    out = _empty_tokens(rows, indices, unique)
    if out.numel():
        width = rows.shape[1]
        _copy_rows_kernel[_tile_grid(len(indices), width)](
            rows,
            out,
            indices,
            None,
            len(indices),
            S_IN=rows.stride(0),
            S_OUT=width,
            WIDTH=width,
            COLS=columns(width),
        )
    return out


@gather_rows.register_fake
def _empty_tokens(rows: Tensor, indices: Tensor, unique: bool) -> Tensor:
    return rows.new_empty(indices.shape[0], rows.shape[1])


@torch.library.custom_op("fastjepa::scatter_rows", mutates_args=())
def scatter_rows(grads: Tensor, indices: Tensor, num_rows: int) -> Tensor:
    """Zeros [num_rows, D] with out[indices] = grads, where no index is repeated."""
    width = grads.shape[1]
    out = grads.new_zeros(num_rows, width)
    if grads.numel():
        grads = rows_contiguous(grads)
        _copy_rows_kernel[_tile_grid(len(indices), width)](
            grads,
            out,
            None,
            indices,
            len(indices),
            S_IN=grads.stride(0),
            S_OUT=width,
            WIDTH=width,
            COLS=columns(width),
        )
    return out


@torch.library.custom_op("fastjepa::sum_rows", mutates_args=())
def sum_rows(grads: Tensor, indices: Tensor, num_rows: int) -> Tensor:
    """[num_rows, D] with out[r] = sum of grads[t] over t with indices[t] = r."""
    width = grads.shape[1]
    out = _empty_rows(grads, indices, num_rows)
    if out.numel():
        grads = rows_contiguous(grads)
        in_order, order = torch.sort(indices, stable=True)
        offsets = torch.searchsorted(in_order, torch.arange(num_rows + 1, device=indices.device))
        num_chunks = len(indices) // _CHUNK
        dtype = torch.float64 if grads.dtype == torch.float64 else torch.float32
        chunks = torch.empty(num_chunks, width, dtype=dtype, device=grads.device)  # only some are written and read
        # One warp spans the 256 columns in bf16, so that the sum over its 8 rows stays within each thread.
        tile = {"S_IN": grads.stride(0), "WIDTH": width, "CHUNK": _CHUNK, "COLS": 256, "ROWS": 8, "num_warps": 1}
        num_cols = triton.cdiv(width, tile["COLS"])
        if num_chunks:
            _sum_chunks_kernel[num_chunks, num_cols](grads, in_order, order, chunks, **tile)
        _sum_runs_kernel[num_rows, num_cols](grads, order, offsets, chunks, out, **tile)
    return out


@scatter_rows.register_fake
@sum_rows.register_fake
def _empty_rows(grads: Tensor, indices: Tensor, num_rows: int) -> Tensor:
    return grads.new_empty(num_rows, grads.shape[1])


def _save_indices(ctx: Any, inputs: tuple[Tensor, Tensor, bool], output: Tensor) -> None:
    rows, indices, ctx.unique = inputs
    ctx.num_rows = rows.shape[0]
    ctx.save_for_backward(indices)


def _gather_rows_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    (indices,) = ctx.saved_tensors
    return (scatter_rows if ctx.unique else sum_rows)(grad, indices, ctx.num_rows), None, None


gather_rows.register_autograd(_gather_rows_backward, setup_context=_save_indices)


@torch.library.custom_op("fastjepa::gather_add", mutates_args=())
def gather_add(tokens: Tensor, table: Tensor, positions: Tensor) -> Tensor:
    out = _empty_sums(tokens, table, positions)
    if out.numel():
        width = tokens.shape[1]
        _gather_add_kernel[_tile_grid(len(tokens), width)](
            tokens,
            table,
            positions,
            out,
            len(tokens),
            S_TOKENS=tokens.stride(0),
            S_TABLE=table.stride(0),
            WIDTH=width,
            COLS=columns(width),
        )
    return out


@gather_add.register_fake
def _empty_sums(tokens: Tensor, table: Tensor, positions: Tensor) -> Tensor:
    return tokens.new_empty(tokens.shape, dtype=torch.promote_types(tokens.dtype, table.dtype))


def _save_dtype(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.dtype = inputs[0].dtype


def _gather_add_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return grad.to(ctx.dtype), None, None


gather_add.register_autograd(_gather_add_backward, setup_context=_save_dtype)
