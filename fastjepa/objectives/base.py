"""The contract between a method and the rest of fastjepa.

A method is a room of `fastjepa.objectives` with three things, which `registry` finds by `objective.name`:

- its settings, a dataclass derived from `fastjepa.config.ObjectiveConfig`;
- a `Method`, which is cheap and holds no weights: what the loader prepares, which kernels run, what a step costs;
- an `Objective`, the networks: its forward pass is the loss.

Loader, engine, optimizer, checkpoint, trainer, profiling, plan and evaluation know these classes only. Nothing here is a
plug-in system: a method is a folder and one line in the registry.

Rules that no type states:

- A forward pass uses weights by calling modules, never by reading a parameter of another module: ZeRO stage 3 gathers the
  weights of a module when it is called.
- A forward pass draws nothing at random and writes to nothing: random numbers belong into `prepare`, what is trained
  without gradients into `update_state`. So a micro batch can be computed in slices, replayed and computed again.
- Its launches depend on the shapes of `tensors()` and on `counts` only, or the settings refuse `compile: cuda_graphs`.
- A trained part is trained whole: what stays fixed is a buffer, which is the same at every step.
- Settings are frozen dataclasses of plain values. `build` also works under `torch.device("meta")`.

Shapes: B images of a micro batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn

from fastjepa.config import Config, DataConfig, Pair
from fastjepa_kernels import Operation


class Moment(NamedTuple):
    """A place in a run: schedules are functions of it."""

    step: int
    """Optimizer step, counted from 0."""
    steps_per_epoch: int
    total_steps: int


@dataclass(frozen=True, kw_only=True)
class View:
    """A crop that the loader makes of each image. An image is read once for all its views."""

    image_size: tuple[int, int]
    """Height and width in pixels."""
    crop_scale: Pair | None
    """Area of the random crop as a share of the image; None: the whole image is resized."""
    crop_aspect: Pair
    """Width / height of the random crop, drawn log-uniformly."""
    flip: float = 0.0
    """Probability that the crop is mirrored left to right."""

    @classmethod
    def of(cls, data: DataConfig) -> View:
        """The view that the data settings describe."""
        return cls(image_size=data.image_hw, crop_scale=data.crop_scale, crop_aspect=data.crop_aspect, flip=data.flip)

    def settings(self, data: DataConfig) -> DataConfig:
        """The data settings with this view's crop in place of their own."""
        return replace(
            data,
            image_size=self.image_size,
            crop_scale=self.crop_scale,
            crop_aspect=self.crop_aspect,
            flip=self.flip,
        )


class Tokens(Protocol):
    """Tokens per image, by kind: the sizes that the cost of a step depends on. A NamedTuple of numbers.

    Names with an underscore are of sums that only formulas need; profiles show the others.
    """

    def _asdict(self) -> dict[str, float]: ...


class Lengths(Protocol):
    """The lengths of a micro batch's sequences: small enough to keep for many micro batches, and not read back yet."""

    @property
    def images(self) -> int: ...

    def tokens(self) -> Tokens:
        """Means per image. Reads the lengths back from the device."""
        ...


class Prepared(ABC):
    """One micro batch of one rank on its device, as the objective's forward pass takes it.

    It is made in the loader's thread, ahead of the step, and is a pure function of (seed, step, sample indices). It can be
    copied by `copy.deepcopy`.
    """

    @property
    @abstractmethod
    def num_images(self) -> int:
        """B."""

    @property
    @abstractmethod
    def counts(self) -> Mapping[str, int]:
        """Numbers known on the host, by name, for the line of metrics: tokens, as a rule."""

    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """Every tensor that the forward pass reads, in a fixed order: what a CUDA graph replays."""

    @abstractmethod
    def slices(self, num_images: int) -> Iterator[tuple[Self, float]]:
        """Parts of up to `num_images` images each, and the weight of each part's loss in the loss of the whole.

        Weights sum to 1. A loss that is no such mean (it compares the images of a micro batch, say) has one slice:
        `(self, 1.0)`.
        """

    @abstractmethod
    def lengths(self) -> Lengths:
        """The lengths of its sequences, on which its cost depends, without its data."""


@dataclass(frozen=True)
class DenseBatch(Prepared):
    """A micro batch of tensors whose first dimension is that of the images, and whose images have equally many tokens."""

    data: tuple[Tensor, ...]
    """Each [B, ...]."""
    tokens: Any
    """`Tokens` of each image."""

    @property
    def num_images(self) -> int:
        return len(self.data[0])

    @property
    def counts(self) -> Mapping[str, int]:
        """The tokens of all images, by kind."""
        return {f"{name}_tokens": self.num_images * int(n) for name, n in self.tokens._asdict().items()}

    def tensors(self) -> list[Tensor]:
        return list(self.data)

    def slices(self, num_images: int) -> Iterator[tuple[Self, float]]:
        """The loss is a mean over images: a slice counts by its share of them."""
        for part in zip(*(each.split(num_images) for each in self.data), strict=True):
            yield replace(self, data=part), len(part[0]) / self.num_images

    def lengths(self) -> Lengths:
        return _EqualLengths(self.num_images, self.tokens)


class _EqualLengths(NamedTuple):
    images: int
    of_each: Any

    def tokens(self) -> Tokens:
        found: Tokens = self.of_each
        return found


class Part(NamedTuple):
    """A network of an objective, as optimizer, ZeRO, checkpoints, memory tables and evaluation know it."""

    name: str
    """The objective's attribute that holds it, and so the prefix of its parameters' names in checkpoints."""
    module: nn.Module
    averages: str | None = None
    """The name of the part, listed before this one, whose EMA this part is. It has no gradients then."""


def describe_parts(parts: Sequence[Part], evaluated: str) -> dict[str, str]:
    """Name the role of each part, for those who read its weights."""
    roles = {part.name: f"EMA of {part.averages}" if part.averages else "trained" for part in parts}
    return {name: f"{role}, evaluated" if name == evaluated else role for name, role in roles.items()}


class Output(NamedTuple):
    """The result of a forward pass."""

    loss: Tensor
    """A scalar in fp32: the mean over the micro batch."""
    signals: Mapping[str, Tensor]
    """Scalars by name, detached, on the device: means over the micro batch. Nobody reads them before a line is due."""
    statistics: Mapping[str, Tensor] = MappingProxyType({})
    """Tensors by name, detached: means over the micro batch, of which `Objective.update_state` gets the mean of the step."""


class Objective(nn.Module, ABC):
    """The networks of a method. Every parameter belongs to one of its parts."""

    @property
    @abstractmethod
    def parts(self) -> tuple[Part, ...]:
        """The networks, in the order in which the forward pass needs their weights; an average comes after its source."""

    @abstractmethod
    def compute(self, batch: Any) -> Output:
        """The forward pass of a micro batch (`Prepared`, of the method's own class)."""

    def state(self) -> dict[str, Tensor]:
        """Buffers that are trained without gradients (a centre, say), by their names in `state_dict()`.

        They are fp32, the same on all ranks, and are checkpointed.
        """
        return {}

    def update_state(self, statistics: Mapping[str, Tensor]) -> None:
        """Write to the buffers of `state()`, in place. Called after an optimizer step, if there are statistics.

        What it writes is undone, without reading anything back, if the step was skipped.

        Args:
            statistics: those of `Output`: means over all micro batches and ranks of the step, fp32.
        """
        raise NotImplementedError(f"{type(self).__name__} has statistics, and no update_state")

    def forward(self, batch: Prepared, autocast: torch.dtype | None = None) -> Output:
        """`compute`, under autocast to the given dtype.

        Autocast is entered here and not around the call, because DeepSpeed on a GPU turns an autocast around its own call
        of the model off.
        """
        device = batch.tensors()[0].device.type
        with torch.autocast(device, autocast or torch.bfloat16, enabled=autocast is not None):
            return self.compute(batch)

    def part(self, name: str) -> nn.Module:
        """The part of this name."""
        return next(part.module for part in self.parts if part.name == name)

    def trained_parameters(self) -> list[nn.Parameter]:
        """Parameters that get gradients: those of the parts that are no averages."""
        return [p for part in self.parts if part.averages is None for p in part.module.parameters()]


def check_objective(objective: Objective, evaluated: str) -> None:
    """Hold networks to the contract of `Objective`.

    Raises:
        TypeError: they break it; one problem a line.
    """
    parts = {part.name: part for part in objective.parts}
    problems = [] if evaluated in parts else [f"evaluated part {evaluated}: expected one of {', '.join(parts)}"]
    shapes: dict[str, dict[str, torch.Size]] = {}
    for name, part in parts.items():
        if getattr(objective, name, None) is not part.module:
            problems.append(f"part {name}: expected the module to be the attribute of that name")
        shapes[name] = {n: p.shape for n, p in part.module.named_parameters()}
        if part.averages is None:
            fixed = [n for n, p in part.module.named_parameters() if not p.requires_grad]
            problems += [f"{name}.{n} needs no gradient: make it a buffer, or its module no part" for n in fixed]
        elif shapes.get(part.averages) != shapes[name]:
            problems.append(
                f"part {name}: expected {part.averages} before it, with parameters of the same names and shapes"
            )
    owners = Counter(id(p) for part in parts.values() for p in part.module.parameters())
    for name, parameter in objective.named_parameters():
        if owners[id(parameter)] != 1:
            problems.append(f"{name} is in {owners[id(parameter)]} parts: expected one")
    state = objective.state()
    saved = objective.state_dict()
    for name, buffer in objective.named_buffers():
        if name in state and (buffer is not state[name] or buffer.dtype != torch.float32):
            problems.append(f"state buffer {name}: expected the objective's own, in fp32")
        elif name in saved and not buffer.is_floating_point():
            problems.append(f"buffer {name} is {buffer.dtype}: expected floating point, or persistent=False")
    problems += [
        f"state buffer {name}: expected a persistent buffer of that name" for name in state if name not in saved
    ]
    if problems:
        raise TypeError(f"{type(objective).__name__}: " + "\n".join(problems))


class Method(ABC):
    """A method with the settings of a run: what can be known of it without its networks."""

    stages: tuple[str, ...] = ()
    """Names of the stretches of the forward pass, as `torch.profiler.record_function` marks them, in their order."""
    savings: tuple[str, ...] = ()
    """Boolean settings, as `objective.key`, that leave out work without changing any number."""
    evaluated: str
    """The name of the part that represents an image: a module from images [B, C, H, W] to features [B, N, D]."""

    def __init__(self, config: Config) -> None:
        self.config = config

    @property
    def views(self) -> tuple[View, ...]:
        """The crops of each image that `prepare` takes. Default: one, as the data settings describe it."""
        return (View.of(self.config.data),)

    @abstractmethod
    def build(self) -> Objective:
        """Freshly initialised networks. Draws from torch's generator, which `registry.build_objective` seeds."""

    @abstractmethod
    def prepare(self, views: Sequence[Tensor], sample_indices: Tensor, moment: Moment) -> Prepared:
        """A micro batch, on its device. Called in the loader's threads.

        Args:
            views: per view the crops [B, C, h, w]: uint8, or normalised float32.
            sample_indices: int64 [B], the number of each image in the run's endless sequence of samples.
            moment: the step that the micro batch is for.
        """

    def scalars(self, moment: Moment) -> Mapping[str, float]:
        """Values of the method's own schedules (temperatures, say), for the line of metrics."""
        return {}

    # The operations of fastjepa_kernels that run, and what a step costs, by formula. Tokens are means per image.

    @abstractmethod
    def operations(self, dtype: torch.dtype) -> list[Operation]:
        """The operations that loader and forward pass call, if blocks compute in `dtype`."""

    @abstractmethod
    def typical_tokens(self) -> tuple[Any, Any]:
        """The mean of a run, and the step that needs the most memory."""

    @abstractmethod
    def first_part_flops(self, tokens: Any) -> float:
        """FLOPs per image of the forward pass of the first part's blocks, under which other parts' weights can travel.

        Matrix products only; a multiplication and an addition count as two.
        """

    @abstractmethod
    def step_flops(self, tokens: Any, *, recomputed: bool = True) -> float:
        """FLOPs of one training step per image.

        Args:
            recomputed: count what activation checkpointing computes again. Utilisation (MFU) is reckoned without it.
        """

    @abstractmethod
    def activation_bytes(self, tokens: Any, *, bf16: bool, autocast: bool) -> float:
        """Bytes of activations per image of a micro batch, at the worst moment of a step.

        Args:
            bf16: blocks compute in bf16, else in fp32.
            autocast: over fp32 weights, so that what is between the matrix products stays fp32.
        """
