"""Memory of a training step, by purpose."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor

from fastjepa.engine.base import Engine


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank. A tensor that serves two purposes counts once, for the purpose listed first."""

    weights: int
    """The parts that are trained, with their buffers."""
    averages: int
    """The parts that average others (I-JEPA: the target encoder), with their buffers."""
    gradients: int
    """`grad` of the parameters, if kept between steps. DeepSpeed's own gradients are in `other`."""
    masters: int
    """fp32 weights and averages, if they are separate from the model's tensors."""
    moments: int
    """Moments of AdamW."""
    activations: int
    """The most that a step allocates in addition: activations, their gradients and temporary copies. On a CPU the profiler
    measures it, in tensors. On a GPU it is the peak of the timed steps above what is allocated between them."""
    other: int
    """The rest of the peak: batches prepared ahead and buffers; on a CPU also the interpreter and libraries."""

    @property
    def peak(self) -> int:
        """Peak of allocated memory on a GPU, of resident memory on a CPU."""
        return self.state + self.activations + self.other

    @property
    def state(self) -> int:
        """Everything that stays between steps, except `other`."""
        return self.weights + self.averages + self.gradients + self.masters + self.moments


def measure_memory(engine: Engine, *, activations: int, peak: int) -> Memory:
    """Measure the state that an engine holds, and split the peak of memory by purpose.

    Args:
        engine: an engine between two steps.
        activations: measured bytes that a step allocates in addition.
        peak: measured bytes of the whole process (CPU) or of all allocations (GPU).
    """
    model, counted = engine.model, set[int]()

    def bytes_not_counted_yet(tensors: Iterable[Tensor]) -> int:
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        new = storages.keys() - counted
        counted.update(new)
        return sum(storages[address] for address in new)

    def tensors_of_parts(*, averaging: bool) -> Iterator[Tensor]:
        for part in model.parts:
            if bool(part.averages) == averaging:
                yield from (*part.module.parameters(), *part.module.buffers())

    weights = bytes_not_counted_yet(tensors_of_parts(averaging=False))
    averages = bytes_not_counted_yet(tensors_of_parts(averaging=True))
    gradients = bytes_not_counted_yet(p.grad for p in model.parameters() if p.grad is not None)
    masters = bytes_not_counted_yet(piece.tensor for piece in engine.pieces())
    state = engine.optimizer.state.values()
    moments = bytes_not_counted_yet(value for values in state for value in values.values() if isinstance(value, Tensor))
    known = weights + averages + gradients + masters + moments
    return Memory(weights, averages, gradients, masters, moments, activations, max(0, peak - known - activations))
