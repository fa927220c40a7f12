"""Memory of a training step, part by part."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor

from fastjepa.engine.base import Engine


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank. A tensor that plays two parts counts as the first of them."""

    weights: int
    """Bytes of the parts that are trained, with their buffers."""
    averages: int
    """Bytes of the parts that average others (the target encoder), with their buffers."""
    gradients: int
    """As far as they are kept between steps with the parameters (DeepSpeed keeps its own, in `other`)."""
    masters: int
    """fp32 weights and average, where the model's are other tensors."""
    moments: int
    activations: int
    """The most that a step allocates on top: activations, their gradients and passing copies. On a CPU measured by the
    profiler, in tensors; on a GPU the peak of the timed steps above what is allocated between them."""
    other: int
    """The rest of the peak: batches prepared ahead and buffers; on a CPU the interpreter and libraries too."""

    @property
    def peak(self) -> int:
        """On a GPU of what was allocated, on a CPU of what was resident."""
        return self.state + self.activations + self.other

    @property
    def state(self) -> int:
        return self.weights + self.averages + self.gradients + self.masters + self.moments


def measure_memory(engine: Engine, *, activations: int, peak: int) -> Memory:
    """
    Args:
        engine: between two steps.
        activations: bytes, measured.
        peak: bytes, of all.
    """
    model, counted = engine.model, set[int]()

    def take(tensors: Iterable[Tensor]) -> int:
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        new = storages.keys() - counted
        counted.update(new)
        return sum(storages[address] for address in new)

    def of_parts(*, averaging: bool) -> Iterator[Tensor]:
        for part in model.parts:
            if bool(part.averages) == averaging:
                yield from (*part.module.parameters(), *part.module.buffers())

    weights, averages = take(of_parts(averaging=False)), take(of_parts(averaging=True))
    gradients = take(p.grad for p in model.parameters() if p.grad is not None)
    masters = take(piece.tensor for piece in engine.pieces())
    state = engine.optimizer.state.values()
    moments = take(value for values in state for value in values.values() if isinstance(value, Tensor))
    known = weights + averages + gradients + masters + moments
    return Memory(weights, averages, gradients, masters, moments, activations, max(0, peak - known - activations))
