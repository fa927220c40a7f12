"""The calls by which training uses the kernels: all kernels, configurations and specialisations that a GPU would compile.

A case calls a public function as the trainer does, on uninitialised tensors of a small batch: widths, lengths and
dtypes decide what is compiled, the number of images does not. The work of a case is that of `BATCH_SIZE` images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from torch import Tensor

from benchmarks import kernel_cases as work
from benchmarks.kernel_cases import Shape, Work, shapes
from fastjepa_kernels import MaskRules, Ragged, mask_sampling
from fastjepa_kernels.adamw_ema import adamw_ema_
from fastjepa_kernels.block_attention import block_attention, block_attention_packed
from fastjepa_kernels.masked_gather import gather_add, gather_patches, masked_gather
from fastjepa_kernels.target_loss import target_loss

BATCH_SIZE = 128
_RECORDED_BATCH_SIZE = 4
_RECORDED_PARAMS = 1 << 20


@dataclass(frozen=True)
class Case:
    """One call of an operation: forward, and backward if it is trained."""

    op: str
    name: str
    """The model, then where the call happens in it."""
    dtype: torch.dtype
    run: Callable[[], Tensor | None]
    """Runs the forward pass. If there is a backward pass, the result is differentiated."""
    forward: Work
    """Work of the forward pass."""
    backward: Work | None = None
    """Work of the backward pass; None: there is none."""

    def passes(self) -> Iterator[tuple[str, Work]]:
        """The name and the work of each pass."""
        yield "forward", self.forward
        if self.backward is not None:
            yield "backward", self.backward

    @property
    def model(self) -> str:
        return self.name.partition(" ")[0]

    @property
    def label(self) -> str:
        return f"{self.op} {self.name} {str(self.dtype).removeprefix('torch.')}"


@cache
def all_cases() -> tuple[Case, ...]:
    """Every case. The first call must be outside of `launches.caught`, because it samples masks."""
    full, small = shapes(BATCH_SIZE), shapes(_RECORDED_BATCH_SIZE)
    for batch_size, known in ((BATCH_SIZE, full), (_RECORDED_BATCH_SIZE, small)):  # two more head dims: 128, 88
        known["Ti/16"] = Shape("Ti/16", "vit_tiny", 16, 14, 384, batch_size)
        known["g/16"] = Shape("g/16", "vit_giant", 16, 14, 384, batch_size)
    cases: list[Case] = []
    for name, shape in full.items():
        cases += _attention(shape, small[name], torch.bfloat16)
        if name not in ("Ti/16", "g/16"):
            cases += _gathers(shape, small[name])
            cases += _patches(shape, small[name])
            cases += _optimizer(shape)
        cases += _loss(shape, small[name], torch.bfloat16)
    for dtype in (torch.float16, torch.float32):
        cases += _attention(full["B/16"], small["B/16"], dtype)
        cases += _loss(full["B/16"], small["B/16"], dtype)
    cases += _mask_sampling(full)
    return tuple(cases)


def _attention(full: Shape, small: Shape, dtype: torch.dtype) -> Iterator[Case]:
    def grid(shape: Shape) -> Ragged:
        return Ragged.uniform(shape.batch_size, shape.num_patches)

    def attend_packed(lengths: Ragged, heads: int, head_dim: int) -> Tensor:
        qkv = torch.empty(lengths.total, 3, heads, head_dim, dtype=dtype, requires_grad=True)
        return block_attention_packed(qkv, lengths)

    def attend_subset(queries: Ragged, keys: Ragged, heads: int, head_dim: int) -> Tensor:
        """Attend as the last blocks do: queries only of the tokens that are needed, keys and values from one projection."""
        q = torch.empty(queries.total, heads, head_dim, dtype=dtype, requires_grad=True)
        k, v = torch.empty(keys.total, 2, heads, head_dim, dtype=dtype, requires_grad=True).unbind(1)
        return block_attention(q, k, v, queries, keys)

    def case(name: str, lengths: Callable[[Shape], tuple[Ragged, Ragged]], head_dim: int, *, trained: bool) -> Case:
        (queries, keys), (few_queries, few_keys) = lengths(full), lengths(small)
        sizes = (full.num_heads, head_dim)
        if few_queries is few_keys:
            run = partial(attend_packed, few_keys, *sizes)
        else:
            run = partial(attend_subset, few_queries, few_keys, *sizes)
        return Case(
            "block_attention",
            f"{full.name} {name}",
            dtype,
            run if trained else torch.no_grad()(run),
            work.attention_forward_work(queries, keys, *sizes, dtype.itemsize),
            work.attention_backward_work(queries, keys, *sizes, dtype.itemsize) if trained else None,
        )

    def twice(lengths: Ragged) -> tuple[Ragged, Ragged]:
        return lengths, lengths

    yield case("target", lambda s: twice(grid(s)), full.head_dim, trained=False)
    yield case("target, last block", lambda s: (s.masks.union_lengths, grid(s)), full.head_dim, trained=False)
    yield case("context", lambda s: twice(s.masks.context_lengths), full.head_dim, trained=True)
    yield case("predictor", lambda s: twice(s.masks.predictor_lengths), full.predictor_head_dim, trained=True)
    yield case(
        "predictor, last block",
        lambda s: (s.masks.target_lengths, s.masks.predictor_lengths),
        full.predictor_head_dim,
        trained=True,
    )


def _gathers(full: Shape, small: Shape) -> Iterator[Case]:
    dtype = torch.bfloat16

    def gather(num_rows: int, width: int, indices: Tensor, unique: bool) -> Tensor:
        return masked_gather(torch.empty(num_rows, width, dtype=dtype, requires_grad=True), indices, unique=unique)

    def add(width: int, indices: Tensor, num_positions: int) -> Tensor:
        tokens = torch.empty(len(indices), width, dtype=dtype, requires_grad=True)
        return gather_add(tokens, torch.empty(num_positions, width, dtype=dtype), indices % num_positions)

    def sources(shape: Shape) -> int:
        """Number of rows that the predictor's sequences are gathered from."""
        return shape.masks.context_lengths.total + shape.num_patches

    width = full.predictor_width
    yield Case(
        "masked_gather",
        f"{full.name} rows of the targets",
        dtype,
        partial(gather, small.masks.predictor_lengths.total, width, small.masks.predictor_target_rows, True),
        work.gather_work(full.masks.target_lengths.total, width, 2),
        work.gather_backward_work(full.masks.target_lengths.total, full.masks.predictor_lengths.total, width, 2),
    )
    yield Case(
        "masked_gather",
        f"{full.name} predictor sequences",
        dtype,
        partial(gather, sources(small), width, small.masks.predictor_rows, False),
        work.gather_work(full.masks.predictor_lengths.total, width, 2),
        work.gather_backward_work(full.masks.predictor_lengths.total, sources(full), width, 2),
    )
    yield Case(
        "masked_gather",
        f"{full.name} context positions",
        dtype,
        partial(add, full.width, small.masks.context_indices, full.num_patches),
        work.gather_add_work(full.masks.context_lengths.total, full.width, 2),
    )


def _patches(full: Shape, small: Shape) -> Iterator[Case]:
    def gather(pixels: torch.dtype, indices: Tensor | None) -> None:
        size = small.image_size
        images = torch.empty(small.batch_size, 3, size, size, dtype=pixels)
        gather_patches(images, indices, small.patch_size, mean=work.MEAN, std=work.STD, dtype=torch.bfloat16)

    values = 3 * full.patch_size**2
    for pixels, name in ((torch.uint8, "uint8"), (torch.float32, "float32")):
        for kept, indices, count in (
            ("context", small.masks.context_indices, full.masks.context_lengths.total),
            ("all", None, full.batch_size * full.num_patches),
        ):
            yield Case(
                "masked_gather",
                f"{full.name} pixels {name}, {kept}",
                torch.bfloat16,
                partial(gather, pixels, indices),
                work.gather_patches_work(count, values, pixels.itemsize, 2),
            )


def _optimizer(full: Shape) -> Iterator[Case]:
    n = _RECORDED_PARAMS
    scalars = {name: torch.zeros(()) for name in ("step", "lr", "weight_decay", "ema_momentum")}

    def step(grad_dtype: torch.dtype, copies: torch.dtype | None) -> None:
        param, exp_avg, exp_avg_sq, ema = (torch.empty(n) for _ in range(4))
        param_copy, ema_copy = (None if copies is None else torch.empty(n, dtype=copies) for _ in range(2))
        adamw_ema_(
            param,
            torch.empty(n, dtype=grad_dtype),
            exp_avg,
            exp_avg_sq,
            ema,
            **scalars,
            betas=(0.9, 0.999),
            eps=1e-8,
            grad_scale=torch.ones(()),
            found_inf=torch.zeros(()),
            param_copy=param_copy,
            ema_copy=ema_copy,
        )

    bf16, fp32, numel = torch.bfloat16, torch.float32, full.encoder_params
    name = f"{full.name} encoder"
    bf16_work = work.adamw_ema_work(numel, grad_size=2, copy_size=2)
    yield Case("adamw_ema", f"{name}, copies", bf16, partial(step, bf16, bf16), bf16_work)
    yield Case("adamw_ema", name, fp32, partial(step, fp32, None), work.adamw_ema_work(numel))


def _loss(full: Shape, small: Shape, dtype: torch.dtype) -> Iterator[Case]:
    def loss() -> Tensor:
        predictions = torch.empty(small.masks.target_lengths.total, small.width, dtype=dtype, requires_grad=True)
        features = torch.empty(small.masks.union_lengths.total, small.width, dtype=dtype)
        return target_loss(predictions, features, small.masks.union_rows)

    rows = full.masks.target_lengths.total
    yield Case(
        "target_loss",
        full.name,
        dtype,
        loss,
        work.target_loss_work(rows, full.width, dtype.itemsize),
        work.target_loss_backward_work(rows, full.width, dtype.itemsize),
    )


def _mask_sampling(full: dict[str, Shape]) -> Iterator[Case]:
    def sample(rules: MaskRules) -> None:
        mask_sampling(rules, seed=2**63, step=1, sample_indices=torch.arange(_RECORDED_BATCH_SIZE))

    base = full["B/16"].mask_rules
    kinds = [
        ("B/16", base),
        ("B/16", replace(base, mode="official")),
        ("B/16", replace(base, mode="budget")),
        ("B/16", replace(base, strategy="block", num_target_blocks=1)),
        ("B/16", replace(base, strategy="random", num_target_blocks=1)),
        ("B/16", replace(base, strategy="rasterized", num_target_blocks=3)),
        ("H/14", full["H/14"].mask_rules),
    ]
    for name, rules in kinds:
        label = f"{name} {rules.strategy}, {rules.mode}"
        yield Case(
            "mask_sampling", label, torch.int64, partial(sample, rules), work.mask_sampling_work(full[name].masks)
        )
