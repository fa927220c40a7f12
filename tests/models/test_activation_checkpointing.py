"""model.activation_checkpointing gives the same bits in less memory, and recomputes nothing without a backward pass."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from fastjepa.models.layers import Block
from fastjepa.objectives.ijepa.objective import IJEPAObjective
from tests.support.small import build_ijepa, small_batch, small_config


def objective_with(recompute: bool) -> IJEPAObjective:
    config = small_config()
    return build_ijepa(replace(config, model=replace(config.model, activation_checkpointing=recompute)))


def loss_and_gradients(objective: IJEPAObjective, autocast: torch.dtype | None) -> list[Tensor]:
    loss: Tensor = objective(small_batch(objective.config), autocast).loss
    loss.backward()
    gradients = [p.grad for p in objective.trained_parameters()]
    assert all(gradient is not None for gradient in gradients)
    return [loss.detach(), *(gradient for gradient in gradients if gradient is not None)]


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_loss_and_gradients_are_the_same_bit_for_bit(autocast: torch.dtype | None) -> None:
    kept, recomputed = (loss_and_gradients(objective_with(recompute), autocast) for recompute in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(kept, recomputed, strict=True))


def bytes_kept(objective: IJEPAObjective) -> int:
    """Bytes that the loss keeps for the backward pass beside the weights; each storage counts once."""
    weights = {p.untyped_storage().data_ptr() for p in objective.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x  # keep it, so that no other storage gets its address
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        objective(small_batch(objective.config))
    return sum(x.untyped_storage().nbytes() for address, x in kept.items() if address not in weights)


def test_less_than_a_third_of_the_memory_is_kept_for_the_backward_pass() -> None:
    assert bytes_kept(objective_with(True)) < bytes_kept(objective_with(False)) / 3


def count_runs(model: nn.Module) -> dict[str, int]:
    """The number of forward passes of every block from now on, by the block's name; it goes up with each."""
    runs = {name: 0 for name, module in model.named_modules() if isinstance(module, Block)}

    def counter(name: str) -> None:
        def count(module: nn.Module, args: object) -> None:
            runs[name] += 1

        model.get_submodule(name).register_forward_pre_hook(count)

    for name in runs:
        counter(name)
    return runs


def test_every_trained_block_runs_twice_and_the_target_encoder_once() -> None:
    objective = objective_with(True)
    runs = count_runs(objective)
    objective(small_batch(objective.config)).loss.backward()
    assert runs == {name: 1 if name.startswith("target_encoder") else 2 for name in runs}
    assert len(runs) == 3 + 2 + 3


def test_nothing_is_computed_twice_in_evaluation() -> None:
    objective = objective_with(True).eval()
    runs = count_runs(objective)
    objective(small_batch(objective.config)).loss.backward()
    assert set(runs.values()) == {1}
