"""The contests: for every operation, fastjepa's implementations and all that a trainer could use in their place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import kernel_cases as cases
from benchmarks.kernel_cases import Choice, Shape
from benchmarks.kernels.contest import Contest, Outputs, Providers
from fastjepa_kernels import (
    PackedMasks,
    Ragged,
    adamw_ema_,
    block_attention_packed,
    gather_add,
    gather_patches,
    mask_sampling,
    masked_gather,
    patchify,
    target_loss,
)
from fastjepa_kernels.reference import block_attention_reference, mask_sampling_reference

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Parameters of the optimizer's contest at most: enough to exceed the caches, and all providers hold their state at once.
_MOST_PARAMS = {"cpu": 8_000_000, "cuda": 100_000_000}


def _cuda_only(device: torch.device, *modules: str) -> str | None:
    """The reason why a provider that needs these modules and a GPU cannot run, or None."""
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        return f"{' and '.join(missing)} not installed"
    return None if device.type == "cuda" else "it needs a CUDA device"


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile by torch.compile. It compiles at the first call, and raises there if the machine has no compiler."""
    return torch.compile(function, dynamic=False)


# Attention


def _padded(lengths: Ragged) -> tuple[Tensor, Tensor]:
    """The slot of every token in a padded batch [B L], and the mask [B, 1, 1, L], True at tokens."""
    seq = lengths.sequence_ids()
    device = lengths.cu_seqlens.device
    slots = seq * lengths.max_seqlen + torch.arange(lengths.total, device=device) - lengths.cu_seqlens[seq]
    mask = torch.arange(lengths.max_seqlen, device=device) < lengths.lengths()[:, None]
    return slots, mask[:, None, None, :]


def _attention_providers(
    qkv: Tensor, lengths: Ragged, wrap: Callable[[Callable[[], Tensor]], Callable[[], Outputs]]
) -> Providers:
    """Providers of self-attention on packed qkv [T, 3, H, d] -> [T, H, d].

    Args:
        wrap: turns a function that attends into the forward or the backward pass to time.
    """
    device, dtype, head_dim = qkv.device, qkv.dtype, qkv.shape[-1]
    cu, longest = lengths.cu_seqlens, lengths.max_seqlen
    providers = Providers()
    providers.add_ours(
        "block_attention", lambda: wrap(lambda: block_attention_packed(qkv, lengths)), device, dtype, head_dim
    )

    def sdpa_padded() -> Tensor:
        """Pad, attend with a mask, take the rows back, as a user would. Padding is part of the cost."""
        slots, mask = _padded(lengths)
        dense = qkv.new_zeros(lengths.num_seqs * longest, *qkv.shape[1:]).index_copy(0, slots, qkv)
        q, k, v = dense.unflatten(0, (lengths.num_seqs, longest)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return out.transpose(1, 2).flatten(0, 1).index_select(0, slots)

    providers.add("torch SDPA padded", lambda: wrap(sdpa_padded))

    def sdpa_nested() -> Tensor:
        q, k, v = (
            torch.nested.nested_tensor_from_jagged(x.contiguous(), cu.long(), max_seqlen=longest).transpose(1, 2)
            for x in qkv.unbind(1)
        )
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).values()

    providers.add("torch SDPA nested", lambda: wrap(sdpa_nested))

    def flex() -> Callable[[], Outputs]:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        seq = lengths.sequence_ids()
        mask = create_block_mask(
            lambda b, h, q, k: seq[q] == seq[k], None, None, lengths.total, lengths.total, device=str(device)
        )
        torch._dynamo.reset()  # else it gives up compiling after a few shapes
        compiled = torch.compile(flex_attention, dynamic=False)

        def run() -> Tensor:
            q, k, v = (x.transpose(0, 1)[None] for x in qkv.unbind(1))
            return compiled(q, k, v, block_mask=mask)[0].transpose(0, 1)

        return wrap(run)

    providers.add("torch flex_attention", flex, _cuda_only(device))

    def flash(module: str) -> Callable[[], Outputs]:
        varlen = import_module(module).flash_attn_varlen_func

        def run() -> Tensor:
            out = varlen(*qkv.unbind(1), cu, cu, longest, longest)
            return out[0] if isinstance(out, tuple) else out

        return wrap(run)

    providers.add("FlashAttention-2", lambda: flash("flash_attn"), _cuda_only(device, "flash_attn"))
    providers.add("FlashAttention-3", lambda: flash("flash_attn_interface"), _cuda_only(device, "flash_attn_interface"))
    return providers


def _attention_places(shape: Shape) -> Iterator[tuple[str, Ragged, int]]:
    masks = shape.masks
    yield "target encoder", Ragged.uniform(shape.batch_size, shape.num_patches), shape.head_dim
    yield "context encoder", masks.context_lengths, shape.head_dim
    yield "predictor", masks.predictor_lengths, shape.predictor_head_dim


def attention(shape: Shape, device: torch.device, dtype: torch.dtype) -> Iterator[Contest]:
    for place, lengths, head_dim in _attention_places(shape):
        qkv = torch.randn(lengths.total, 3, shape.num_heads, head_dim, device=device).to(dtype).requires_grad_()
        upstream = torch.randn(lengths.total, shape.num_heads, head_dim, device=device).to(dtype)
        on_device = Ragged(lengths.cu_seqlens.to(device), lengths.max_seqlen, lengths.total)
        exact = qkv.detach().to(torch.float64 if device.type == "cuda" else torch.float32).requires_grad_()
        q, k, v = exact.unbind(1)
        out = block_attention_reference(q, k, v, lengths, lengths, head_dim**-0.5)
        (gradient,) = torch.autograd.grad(out, exact, upstream.to(out.dtype))
        name, element = f"{shape.name} {place}", qkv.element_size()

        def forward(run: Callable[[], Tensor]) -> Callable[[], Outputs]:
            return lambda: run().detach()

        def backward(
            run: Callable[[], Tensor], qkv: Tensor = qkv, upstream: Tensor = upstream
        ) -> Callable[[], Outputs]:
            kept = run()
            return lambda: torch.autograd.grad(kept, qkv, upstream, retain_graph=True)

        for part, wrap, expected, formula in (
            ("forward", forward, out.detach(), cases.attention_forward_work),
            ("backward", backward, gradient, cases.attention_backward_work),
        ):
            work = formula(lengths, lengths, shape.num_heads, head_dim, element)
            providers = _attention_providers(qkv, on_device, wrap)
            yield Contest("block_attention", part, name, dtype, work, (expected,), providers)


# Products


def products(shape: Shape, device: torch.device, dtype: torch.dtype) -> Iterator[Contest]:
    """Linear layers: the first one of each MLP."""
    from fastjepa_kernels import linear  # not above: a revision under comparison may lack this operation

    for place, lengths, _ in _attention_places(shape):
        rows, width = lengths.total, shape.predictor_width if place == "predictor" else shape.width
        sizes = (rows, width), (4 * width, width), (4 * width,)
        inputs = [torch.randn(size, device=device).to(dtype).requires_grad_() for size in sizes]
        upstream = torch.randn(rows, 4 * width, device=device).to(dtype)
        exact = [x.detach().double().requires_grad_() for x in inputs]
        out = F.linear(*exact)
        gradients = torch.autograd.grad(out, exact, upstream.double())

        def forward(inputs: list[Tensor] = inputs) -> Callable[[], Outputs]:
            return lambda: linear(*inputs).detach()

        def backward(inputs: list[Tensor] = inputs, upstream: Tensor = upstream) -> Callable[[], Outputs]:
            kept = linear(*inputs)
            return lambda: torch.autograd.grad(kept, inputs, upstream, retain_graph=True)

        for part, build, expected, formula in (
            ("forward", forward, (out.detach(),), cases.linear_work),
            ("backward", backward, gradients, cases.linear_backward_work),
        ):
            providers = Providers()
            providers.add_ours("linear", build, device, dtype)
            work = formula(rows, width, 4 * width, upstream.element_size())
            yield Contest("linear", part, f"{shape.name} {place}", dtype, work, expected, providers)


# Gathers


def gathers(shape: Shape, device: torch.device, dtype: torch.dtype) -> Iterator[Contest]:
    masks = shape.masks.to(device)
    p, element = shape.patch_size, torch.empty((), dtype=dtype).element_size()
    images = torch.randint(
        0, 256, (shape.batch_size, 3, shape.image_size, shape.image_size), dtype=torch.uint8, device=device
    )
    mean, std = (torch.tensor(x, device=device)[:, None, None] for x in (cases.MEAN, cases.STD))

    def plain_patches(dtype: torch.dtype = dtype) -> Tensor:
        normalised = ((images / 255 - mean) / std).to(dtype)
        return patchify(normalised, p)[masks.context_indices]

    patches = Providers()
    patches.add_ours(
        "masked_gather",
        lambda: lambda: gather_patches(images, masks.context_indices, p, mean=cases.MEAN, std=cases.STD, dtype=dtype),
        device,
        dtype,
    )
    patches.add("torch: normalise, patchify, index", lambda: plain_patches)
    patches.add("torch, compiled", lambda: _compiled(plain_patches))
    work = cases.gather_patches_work(len(masks.context_indices), 3 * p * p, 1, element)
    yield Contest("masked_gather", "patches", shape.name, dtype, work, (plain_patches(torch.float32),), patches)

    width = shape.predictor_width
    sources = masks.context_lengths.total + shape.num_patches
    rows = torch.randn(sources, 3 * width, device=device).to(dtype).requires_grad_()
    indices = masks.predictor_rows
    upstream = torch.randn(len(indices), 3 * width, device=device).to(dtype)
    gradient = torch.zeros(sources, 3 * width, device=device).index_add_(0, indices, upstream.float())

    forward, backward = Providers(), Providers()
    forward.add_ours("masked_gather", lambda: lambda: masked_gather(rows, indices), device, dtype)
    forward.add("torch index_select", lambda: lambda: rows.index_select(0, indices))

    def backward_of(gather: Callable[[], Tensor]) -> Callable[[], Callable[[], Outputs]]:
        def build() -> Callable[[], Outputs]:
            out = gather()
            return lambda: torch.autograd.grad(out, rows, upstream, retain_graph=True)

        return build

    backward.add_ours("masked_gather", backward_of(lambda: masked_gather(rows, indices)), device, dtype)
    backward.add("torch index_select (atomics)", backward_of(lambda: rows.index_select(0, indices)))
    backward.add("torch embedding", backward_of(lambda: F.embedding(indices, rows)))
    work = cases.gather_work(len(indices), 3 * width, element)
    expected = rows.detach().float()[indices]
    yield Contest("masked_gather", "tokens forward", shape.name, dtype, work, (expected,), forward)
    work = cases.gather_backward_work(len(indices), sources, 3 * width, element)
    yield Contest("masked_gather", "tokens backward", shape.name, dtype, work, (gradient,), backward)

    tokens = torch.randn(masks.context_lengths.total, shape.width, device=device).to(dtype)
    table = torch.randn(shape.num_patches, shape.width, device=device).to(dtype)
    positions = masks.context_indices % shape.num_patches
    adds = Providers()
    adds.add_ours("masked_gather", lambda: lambda: gather_add(tokens, table, positions), device, dtype)
    adds.add("torch index_select, add", lambda: lambda: tokens + table.index_select(0, positions))
    adds.add("torch, compiled", lambda: _compiled(lambda: tokens + table.index_select(0, positions)))
    work = cases.gather_add_work(len(positions), shape.width, element)
    expected = tokens.float() + table[positions].float()
    yield Contest("masked_gather", "positions", shape.name, dtype, work, (expected,), adds)


# Optimizer


def optimizers(shape: Shape, device: torch.device, dtype: torch.dtype) -> Iterator[Contest]:
    numel = min(shape.encoder_params, _MOST_PARAMS[device.type])
    numel = -(-numel // 16) * 16
    half = dtype != torch.float32
    betas, eps, lr, decay, momentum = (0.9, 0.999), 1e-8, 1e-3, 0.04, 0.5
    start = 1e-3 * torch.randn(numel, device=device)  # as small as the update, so that a wrong update shows
    grad = torch.randn(numel, device=device)

    def buffers() -> dict[str, Tensor]:
        return {
            "param": start.clone(),
            "m": torch.zeros_like(start),
            "v": torch.zeros_like(start),
            "ema": start.clone(),
        }

    def copies() -> dict[str, Tensor]:
        return {name: torch.empty_like(start, dtype=dtype) for name in ("param_copy", "ema_copy")} if half else {}

    def fused_ours() -> Callable[[], Outputs]:
        state, extra = buffers(), copies()
        step, lr_, decay_, momentum_ = (torch.tensor(x, device=device) for x in (1.0, lr, decay, momentum))

        def run() -> Outputs:
            adamw_ema_(
                state["param"],
                grad,
                state["m"],
                state["v"],
                state["ema"],
                step=step,
                lr=lr_,
                betas=betas,
                eps=eps,
                weight_decay=decay_,
                ema_momentum=momentum_,
                **extra,
            )
            return state["param"], state["ema"]

        return run

    def separate(**options: bool) -> Callable[[], Outputs]:
        state, extra = buffers(), copies()
        weight = state["param"].requires_grad_()
        weight.grad = grad
        optimizer = torch.optim.AdamW([weight], lr=lr, betas=betas, eps=eps, weight_decay=decay, **options)

        @torch.no_grad()
        def run() -> Outputs:
            optimizer.step()
            torch._foreach_lerp_([state["ema"]], [weight], 1 - momentum)
            if half:
                torch._foreach_copy_([extra["param_copy"], extra["ema_copy"]], [weight, state["ema"]])
            return weight.detach(), state["ema"]

        return run

    def compiled() -> Callable[[], Outputs]:
        """The plain formula compiled by torch.compile, with its hyper-parameters on the device."""
        state, extra = buffers(), copies()
        numbers = [torch.tensor(x, device=device) for x in (1.0, lr, decay, momentum)]

        @torch.no_grad()
        def update(param: Tensor, m: Tensor, v: Tensor, ema: Tensor, *scalars: Tensor) -> None:
            step, lr, decay, momentum = scalars
            m.lerp_(grad, 1 - betas[0])
            v.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
            param.mul_(1 - lr * decay)
            param.sub_(lr / (1 - betas[0] ** step) * m / ((v / (1 - betas[1] ** step)).sqrt() + eps))
            ema.lerp_(param, 1 - momentum)
            for copy, x in zip(extra.values(), (param, ema), strict=False):
                copy.copy_(x)

        fused = _compiled(update)

        def run() -> Outputs:
            fused(*state.values(), *numbers)
            return state["param"], state["ema"]

        return run

    exact = start.double().requires_grad_()
    exact.grad = grad.double()
    torch.optim.AdamW([exact], lr=lr, betas=betas, eps=eps, weight_decay=decay).step()
    expected = (exact.detach(), start.double().lerp(exact.detach(), 1 - momentum))
    providers = Providers()
    # Every provider has its own state, so the first step, which is checked, is the same for all of them.
    providers.add_ours("adamw_ema", fused_ours, device, torch.float32)
    providers.add("torch AdamW fused + foreach EMA", lambda: separate(fused=True))
    providers.add("torch AdamW foreach + foreach EMA", lambda: separate(foreach=True))
    providers.add("torch formula, compiled", compiled)
    work = cases.adamw_ema_work(numel, copy_size=2 if half else 0)
    yield Contest("adamw_ema", "step", f"{shape.name} {numel / 1e6:.0f} M", torch.float32, work, expected, providers)


# Loss


def losses(shape: Shape, device: torch.device, dtype: torch.dtype) -> Iterator[Contest]:
    masks = shape.masks.to(device)
    features = torch.randn(masks.union_lengths.total, shape.width, device=device).to(dtype)
    predictions = torch.randn(masks.target_lengths.total, shape.width, device=device).to(dtype).requires_grad_()
    rows = masks.union_rows

    def plain(z: Tensor = predictions, h: Tensor = features) -> Tensor:
        targets = F.layer_norm(h if h.dtype == torch.float64 else h.float(), (shape.width,))[rows]
        return F.smooth_l1_loss(z.to(targets.dtype), targets)

    exact = predictions.detach().double().requires_grad_()
    loss = plain(exact, features.double())
    (gradient,) = torch.autograd.grad(loss, exact)
    element = features.element_size()

    def forward_of(run: Callable[[], Tensor]) -> Callable[[], Callable[[], Outputs]]:
        return lambda: lambda: run().detach()

    def backward_of(run: Callable[[], Tensor]) -> Callable[[], Callable[[], Outputs]]:
        def build() -> Callable[[], Outputs]:
            out = run()
            return lambda: torch.autograd.grad(out, predictions, retain_graph=True)

        return build

    for part, pass_of, expected, formula in (
        ("forward", forward_of, loss.detach(), cases.target_loss_work),
        ("backward", backward_of, gradient, cases.target_loss_backward_work),
    ):
        providers = Providers()
        providers.add_ours("target_loss", pass_of(lambda: target_loss(predictions, features, rows)), device, dtype)
        providers.add("torch: layer_norm, index, smooth_l1", pass_of(plain))
        providers.add("torch, compiled", pass_of(_compiled(plain)))
        work = formula(len(rows), shape.width, element)
        yield Contest("target_loss", part, shape.name, dtype, work, (expected,), providers)


# Masks


def masks(shape: Shape, device: torch.device, dtype: torch.dtype) -> Iterator[Contest]:
    indices = torch.arange(shape.batch_size, device=device)
    rules = shape.mask_rules

    def numbers(packed: PackedMasks) -> Outputs:
        """The outputs whose lengths do not depend on where they were sampled."""
        return packed.sizes, packed.context_cu_seqlens, packed.union_cu_seqlens, packed.predictor_cu_seqlens

    def loop() -> Outputs:
        return numbers(mask_sampling_reference(rules, seed=0, step=0, sample_indices=indices.cpu()))

    expected = tuple(x.to(device) for x in loop())
    providers = Providers()
    providers.add_ours(
        "mask_sampling",
        lambda: lambda: numbers(mask_sampling(rules, seed=0, step=0, sample_indices=indices)),
        device,
        torch.int64,
    )
    providers.add("a Python loop over the images (CPU)", lambda: loop)
    work = cases.mask_sampling_work(shape.masks)
    yield Contest("mask_sampling", "batch", shape.name, torch.int64, work, expected, providers)


CONTESTS = {
    "block_attention": attention,
    "linear": products,
    "masked_gather": gathers,
    "adamw_ema": optimizers,
    "target_loss": losses,
    "mask_sampling": masks,
}
"""Operation -> the function that yields its contests for a shape, device and dtype."""


def chosen(choice: Choice, device: torch.device) -> Iterator[Contest]:
    """The contests that `choice` selects, shape by shape."""
    for name, shape in cases.shapes(choice.batch_size).items():
        for op in choice.ops if name in choice.shapes else []:
            yield from CONTESTS[op](shape, device, DTYPES[choice.dtype])
