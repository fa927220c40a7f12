"""A method in few lines: the mean pixels of hidden patches are predicted; with an EMA part and a trained buffer."""

import copy
from collections import namedtuple
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastjepa.config import Config, ObjectiveConfig
from fastjepa.models.vision_transformer import VisionTransformer
from fastjepa.objectives.base import DenseBatch, Method, Moment, Objective, Output, Part
from fastjepa_kernels import Operation


@dataclass(frozen=True, kw_only=True)
class ToyConfig(ObjectiveConfig):
    name: str = "toy"
    hidden: float = 0.5


Tokens = namedtuple("Tokens", ["patch"])


class ToyObjective(Objective):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.encoder = VisionTransformer(config.model, config.data)
        self.head, self.slow = nn.Linear(config.model.size.embed_dim, 1), copy.deepcopy(self.encoder)
        self.register_buffer("centre", torch.zeros(1))

    @property
    def parts(self) -> tuple[Part, ...]:
        return Part("encoder", self.encoder), Part("head", self.head), Part("slow", self.slow, averages="encoder")

    def state(self) -> dict[str, Tensor]:
        return {"centre": self.get_buffer("centre")}

    def compute(self, batch: DenseBatch) -> Output:
        images, masked = batch.data
        light, features = images.float().mean(1) / 255, self.encoder(masked)
        means = F.avg_pool2d(light, self.encoder.patch_size).flatten(1) - self.get_buffer("centre")
        error = F.mse_loss(self.head(features)[..., 0].float(), means)
        with torch.no_grad():
            goal = self.slow(images).mean(1)
        return Output(error + F.mse_loss(features.mean(1), goal), {"error": error.detach()}, {"light": light.mean()})

    def update_state(self, statistics: Mapping[str, Tensor]) -> None:
        self.get_buffer("centre").lerp_(statistics["light"], 0.1)


class Toy(Method):
    evaluated = "slow"

    def build(self) -> ToyObjective:
        return ToyObjective(self.config)

    def prepare(self, views: Sequence[Tensor], sample_indices: Tensor, moment: Moment) -> DenseBatch:
        grid = torch.arange(self.config.num_patches, device=sample_indices.device).view(self.config.grid_h, -1)
        draws = (sample_indices[:, None, None] * 7919 + grid * 104729 + moment.step * 1299709) % 1000
        seen = (draws >= 1000 * self.config.objective.hidden)[:, None].float()  # type: ignore[attr-defined]
        masked = views[0] * F.interpolate(seen, scale_factor=float(self.config.model.patch_size)).to(views[0].dtype)
        return DenseBatch((views[0], masked), Tokens(self.config.num_patches))

    def scalars(self, moment: Moment) -> dict[str, float]:
        return {"progress": moment.step / moment.total_steps}

    def operations(self, dtype: torch.dtype) -> list[Operation]:
        return [Operation("block_attention", dtype, 8), Operation("masked_gather", dtype)]  # heads of 8

    def typical_tokens(self) -> tuple[Tokens, Tokens]:
        return (Tokens(self.config.num_patches),) * 2

    def first_part_flops(self, tokens: Tokens) -> float:
        return 24.0 * tokens.patch * self.config.model.size.depth * self.config.model.size.embed_dim**2

    def step_flops(self, tokens: Tokens, *, recomputed: bool = True) -> float:
        return 4 * self.first_part_flops(tokens)

    def activation_bytes(self, tokens: Tokens, *, bf16: bool, autocast: bool) -> float:
        return 64.0 * tokens.patch * self.config.model.size.depth * self.config.model.size.embed_dim
