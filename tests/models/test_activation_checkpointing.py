"""model.activation_checkpointing: the same bits, less memory, and never where there is no backward pass."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from fastjepa.models.layers import Block
from fastjepa.objectives.ijepa.objective import IJEPA, build_model
from tests.support.small import small_batch, small_config


def model_with(recompute: bool) -> IJEPA:
    config = small_config()
    return build_model(replace(config, model=replace(config.model, activation_checkpointing=recompute)))


def loss_and_gradients(model: IJEPA, autocast: bool) -> list[Tensor]:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss: Tensor = model(*small_batch(model.config))
    loss.backward()
    gradients = [p.grad for p in model.trained_parameters()]
    assert all(gradient is not None for gradient in gradients)
    return [loss.detach(), *(gradient for gradient in gradients if gradient is not None)]


@pytest.mark.parametrize("autocast", [False, True])
def test_loss_and_gradients_are_the_same_bit_for_bit(autocast: bool) -> None:
    kept, recomputed = (loss_and_gradients(model_with(recompute), autocast) for recompute in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(kept, recomputed, strict=True))


def bytes_kept(model: IJEPA) -> int:
    """Memory that the loss keeps for backward, beside the weights; each buffer once."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x  # held, so that no other buffer gets its address
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        model(*small_batch(model.config))
    return sum(x.untyped_storage().nbytes() for address, x in kept.items() if address not in weights)


def test_less_memory_is_held_for_the_backward_pass() -> None:
    assert bytes_kept(model_with(True)) < bytes_kept(model_with(False)) / 3


def count_runs(model: nn.Module) -> dict[str, int]:
    """Forward passes of every block from now on, by name."""
    runs = {name: 0 for name, module in model.named_modules() if isinstance(module, Block)}

    def counter(name: str) -> None:
        def count(module: nn.Module, args: object) -> None:
            runs[name] += 1

        model.get_submodule(name).register_forward_pre_hook(count)

    for name in runs:
        counter(name)
    return runs


def test_every_trained_block_runs_twice_and_the_target_encoder_once() -> None:
    model = model_with(True)
    runs = count_runs(model)
    model(*small_batch(model.config)).backward()
    assert runs == {name: 1 if name.startswith("target_encoder") else 2 for name in runs}
    assert len(runs) == 3 + 2 + 3


def test_nothing_is_computed_twice_in_evaluation() -> None:
    model = model_with(True).eval()
    runs = count_runs(model)
    model(*small_batch(model.config)).backward()
    assert set(runs.values()) == {1}
