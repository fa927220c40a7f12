"""Every setting of a run, typed: one frozen dataclass per component, nested in `Config`.

The defaults are those of I-JEPA (Assran et al. 2023, appendix A.1; the official configuration where paper and code differ).
`fastjepa.config.file` reads these from YAML and the command line. A value that cannot work is refused here, when the
configuration is read, with the key, the value and what was expected.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

from fastjepa.errors import ConfigError

Pair = tuple[float, float]


class ModelSize(NamedTuple):
    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float


# The paper's models (appendix A.1) and the official model code. Their head dim is 64, but 80 for huge and 88 for giant.
MODEL_SIZES = {
    "vit_tiny": ModelSize(192, 12, 3, 4.0),
    "vit_small": ModelSize(384, 12, 6, 4.0),
    "vit_base": ModelSize(768, 12, 12, 4.0),
    "vit_large": ModelSize(1024, 24, 16, 4.0),
    "vit_huge": ModelSize(1280, 32, 16, 4.0),
    "vit_giant": ModelSize(1408, 40, 16, 48 / 11),
}


def require(ok: bool, key: str, value: object, expected: str) -> None:
    if not ok:
        raise ConfigError(f"{key} = {value!r}: expected {expected}")


def require_width(key: str, width: int, num_heads: int) -> None:
    """Refuse a width of tokens that attention or the position table cannot divide."""
    require(width > 0 and width % num_heads == 0, key, width, f"a multiple of model.num_heads = {num_heads}")
    require(width % 4 == 0, key, width, "a multiple of 4 (the 2-D sin-cos position table has 4 parts)")


def require_range(key: str, value: Pair, low: float, high: float) -> None:
    ok = low < value[0] <= value[1] <= high
    require(
        ok, key, list(value), f"[min, max] with {low:g} < min <= max" + (f" <= {high:g}" if high < math.inf else "")
    )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The source of the images and their crops. There is no other augmentation (paper, section 4)."""

    source: str = "fashion_mnist"
    """A folder of images, tar shards (WebDataset), Arrow or Parquet files (Hugging Face), a text file that lists images, or
    `fashion_mnist`, the set shipped in the package; see fastjepa.data.sources."""
    val_source: str | None = None
    """Held-out images for the probes; null takes the source's own split, if it has one."""
    image_size: int | tuple[int, int] = 224
    """Height and width of a crop in pixels; one number means square."""
    in_channels: int = 3
    """3 for RGB, 1 for grey. Images are converted."""
    crop_scale: Pair | None = (0.3, 1.0)
    """Area of a random crop as a share of the image; null: the whole image is resized."""
    crop_aspect: Pair = (3 / 4, 4 / 3)
    """Aspect ratio (width / height) of a random crop, drawn log-uniformly."""
    flip: float = 0.0
    """Probability that a crop is mirrored left to right. The official runs do not flip."""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """Mean of the pixels per channel, in [0, 1]."""
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    """Standard deviation of the pixels per channel, in [0, 1]."""
    loader: Literal["auto", "dali", "turbo"] = "auto"
    """dali: NVIDIA DALI, on the GPU if there is one. turbo: libjpeg-turbo and Pillow on the CPU. auto: dali with a GPU where
    it is installed, else turbo, which is the faster one on a CPU."""
    pixels: Literal["uint8", "normalised"] = "uint8"
    """The pixels of a batch. uint8 takes a quarter of the bytes, and the model normalises the patches that it takes.
    normalised is fp32, (x / 255 - mean) / std."""
    dct_scaling: bool = True
    """true: a crop that has four times the pixels of the result a side, or more, begins and ends at multiples of 2, 4 or 8
    pixels, and turbo decodes a JPEG file at 1/2, 1/4 or 1/8 of its size. false: all crops are torchvision's, to the
    pixel."""
    hw_decoder_load: float = 0.65
    """Share of the JPEG files that DALI on a GPU gives to the hardware decoder (A100, H100 and newer); 0 turns it off."""
    num_threads: int = 4
    """Threads per rank that read and decode. DALI decodes with as many threads of its own."""
    prefetch: int = 2
    """Micro batches prepared ahead of the step."""
    max_pixels: int = 100_000_000
    """An image with more pixels is refused by its header, before it is decoded."""
    max_bad_share: float = 0.01
    """The run stops when more than this share of the data set's images, and more than one image, have turned out bad. With 0
    it stops at the first."""

    def __post_init__(self) -> None:
        require(min(self.image_hw) > 0, "data.image_size", self.image_size, "positive sizes")
        require(self.in_channels > 0, "data.in_channels", self.in_channels, "a positive number")
        for key, values in (("mean", self.mean), ("std", self.std)):
            require(
                len(values) == self.in_channels,
                f"data.{key}",
                list(values),
                f"{self.in_channels} values (data.in_channels)",
            )
        require(min(self.std) > 0, "data.std", list(self.std), "positive values")
        if self.crop_scale is not None:
            require_range("data.crop_scale", self.crop_scale, 0, 1)
        require_range("data.crop_aspect", self.crop_aspect, 0, math.inf)
        for key in ("num_threads", "prefetch", "max_pixels"):
            require(getattr(self, key) > 0, f"data.{key}", getattr(self, key), "a positive number")
        for key in ("flip", "hw_decoder_load", "max_bad_share"):
            require(0 <= getattr(self, key) <= 1, f"data.{key}", getattr(self, key), "a number from 0 to 1")

    @property
    def image_hw(self) -> tuple[int, int]:
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The vision transformer. null takes the named model's value."""

    name: Literal["vit_tiny", "vit_small", "vit_base", "vit_large", "vit_huge", "vit_giant"] = "vit_base"
    patch_size: int = 16
    embed_dim: int | None = None
    depth: int | None = None
    num_heads: int | None = None
    mlp_ratio: float | None = None
    init: Literal["official", "depth_rescale", "fan_in"] = "official"
    """official: normal weights of std 0.02, not cut, as the released models were trained. depth_rescale: the same, with the
    residual outputs of block l divided by sqrt(2 l). fan_in: normal of std 1/sqrt(fan_in), cut at two standard deviations
    (which leaves 0.88/sqrt(fan_in)), with that rescale: narrow models (32 to 64) collapse without it."""
    activation_checkpointing: bool = False
    """true: each transformer block keeps only its input for the backward pass, which computes the rest again. The numbers
    are the same, memory is much less, and the blocks that are trained compute one more forward pass."""

    def __post_init__(self) -> None:
        for key, value in (*self.size._asdict().items(), ("patch_size", self.patch_size)):
            require(value > 0, f"model.{key}", value, "a positive number")
        require_width("model.embed_dim", self.size.embed_dim, self.size.num_heads)

    @property
    def size(self) -> ModelSize:
        """The named model's size, with the values given here in place of its own."""
        given = {key: getattr(self, key) for key in ModelSize._fields if getattr(self, key) is not None}
        return MODEL_SIZES[self.name]._replace(**given)


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """The method that is learnt. Each has a dataclass derived from this one, in its room of fastjepa.objectives."""

    name: str
    """The method: ijepa."""

    def check(self, config: Config) -> None:
        """Check these settings against those of the run that holds them.

        Raises:
            ConfigError: they cannot work together.
        """

    def resolved(self, config: Config) -> ObjectiveConfig:
        """The same settings with every null that stands for a named model's value replaced by that value."""
        return self


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW, its schedules, and the EMA of the parts that have one (paper, appendix A.1)."""

    lr: float = 1e-3
    """Peak learning rate, for the global batch size of the run (no scaling is applied)."""
    start_lr: float = 2e-4
    """Learning rate at the start of the warm-up."""
    final_lr: float = 1e-6
    """Learning rate at the end of the cosine."""
    warmup_epochs: float = 40.0
    """Epochs in which the learning rate rises linearly from start_lr to lr."""
    weight_decay: float = 0.04
    """Weight decay at the start; it follows a cosine to final_weight_decay. Biases and 1-D tensors have none."""
    final_weight_decay: float = 0.4
    """Weight decay at the end."""
    betas: Pair = (0.9, 0.999)
    eps: float = 1e-8
    clip_grad: float | None = None
    """Largest global gradient norm; null: no clipping, as in the official code."""
    ema_momentum: Pair = (0.996, 1.0)
    """Weight of the old average at the start and at the end of the run, linear between."""
    schedule_scale: float = 1.0
    """All schedules are stretched by this factor and cut at the end of the run (`ipe_scale` in the official code)."""

    def __post_init__(self) -> None:
        for key in ("lr", "start_lr", "final_lr", "warmup_epochs", "weight_decay", "final_weight_decay"):
            require(getattr(self, key) >= 0, f"optim.{key}", getattr(self, key), "0 or more")
        require(0 <= min(self.betas) <= max(self.betas) < 1, "optim.betas", list(self.betas), "two values in [0, 1)")
        require(self.eps > 0, "optim.eps", self.eps, "a positive number")
        require(
            self.clip_grad is None or self.clip_grad > 0, "optim.clip_grad", self.clip_grad, "a positive number or null"
        )
        m0, m1 = self.ema_momentum
        require(0 <= m0 <= m1 <= 1, "optim.ema_momentum", [m0, m1], "[start, end] with 0 <= start <= end <= 1")
        require(self.schedule_scale >= 1, "optim.schedule_scale", self.schedule_scale, "1 or more")


@dataclass(frozen=True, kw_only=True)
class KernelsConfig:
    """The implementation that runs of each operation of fastjepa_kernels.

    auto takes Triton on a GPU and PyTorch elsewhere, by device, dtype and head dim, and logs the choice. To ask for one that
    cannot run is an error. The environment variable FASTJEPA_KERNELS (operation=implementation,...) goes before these.
    """

    masked_gather: Literal["auto", "triton", "torch"] = "auto"
    block_attention: Literal["auto", "triton", "varlen", "buckets", "padded", "xformers"] = "auto"
    """varlen: PyTorch's FlashAttention on packed sequences. buckets: one dense call per length (CPU). padded: dense, with a
    mask."""
    adamw_ema: Literal["auto", "triton", "torch", "apex"] = "auto"
    mask_sampling: Literal["auto", "triton", "torch"] = "auto"
    target_loss: Literal["auto", "triton", "torch"] = "auto"
    linear: Literal["auto", "onednn", "torch"] = "auto"
    """onednn: for fp32 on a CPU with AVX-512. torch: PyTorch's, for all else."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """All settings of a run."""

    seed: int = 0
    output_dir: str = "runs/default"
    """The run folder: config.yaml, metrics.jsonl, checkpoints/."""
    epochs: float = 300.0
    """Passes over the data; a fraction is allowed."""
    global_batch_size: int = 2048
    """Images per optimizer step over all ranks and micro batches. The run is the same on any number of GPUs, except with
    objective.masks.mode = official, whose cut depends on the micro batch."""
    micro_batch_size: int | None = None
    """Images that a rank takes at a time; null: its whole share. Gradients are accumulated over its micro batches."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 on a GPU that has it (compute capability 8.0 or more), else fp32. Optimizer state and EMA are fp32 always.
    bf16 is autocast over fp32 weights with plain PyTorch and at ZeRO stage 0, as in the official code; at stages 1 to 3
    weights, activations and their gradients are bf16, with fp32 masters."""
    target_precision: Literal["same", "fp8"] = "same"
    """fp8: the blocks of parts that are averages (the target encoder) multiply matrices in e4m3, scaled by token and output
    channel, on GPUs of compute capability 8.9 or newer. It changes the targets a little: see README."""
    compile: Literal["auto", "none", "blocks", "cuda_graphs"] = "auto"
    """blocks: torch.compile each transformer block, which fuses what lies between the matrix products. The lengths of
    sequences are symbols in it, so that other batches need no new compilation. auto: blocks on a GPU, none on a CPU, where
    it gains nothing. It is none at ZeRO stage 3 too, which cannot compile, and where the compiler fails, which is logged.
    cuda_graphs: blocks, and each micro batch is replayed as a CUDA graph, for models and batches so small that the GPU waits
    for the host. It needs plain PyTorch on a GPU and static shapes: objective.masks.mode = budget (not rasterized) and
    objective.savings.target_last_block = false."""
    resume: str = "auto"
    """auto: continue from the newest checkpoint of output_dir, if any; never: refuse a folder that holds a run; or the path
    of a checkpoint."""
    log_interval: int = 10
    """Steps between two lines of metrics.jsonl."""
    checkpoint_interval: int = 1000
    """Steps between two checkpoints; one is always written at the end."""
    keep_last: int = 3
    """Number of the newest checkpoints that are kept."""
    keep_every: int | None = None
    """Checkpoints whose step is a multiple of this are kept as well; null: no others."""
    async_checkpoint: bool = True
    """Checkpoints are written while training goes on, if the host memory has room for a copy of weights and optimizer."""
    max_skipped_steps: int = 10
    """A step with a loss or gradient that is not finite changes nothing; the run stops after this many of them in a row."""
    hang_timeout: float = 1800.0
    """Seconds without progress after which the run stops, and says which rank is behind and where it is."""
    evaluate: bool = True
    """true: run the k-NN and linear probes at the end, if the source has labels and a held-out split."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig
    optim: OptimConfig = field(default_factory=OptimConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**63, "seed", self.seed, "a number in [0, 2^63)")
        for key in ("output_dir", "resume"):
            require(getattr(self, key) != "", key, "", "a path")
        for key in (
            "epochs",
            "global_batch_size",
            "log_interval",
            "checkpoint_interval",
            "keep_last",
            "max_skipped_steps",
            "hang_timeout",
        ):
            require(getattr(self, key) > 0, key, getattr(self, key), "a positive number")
        every = self.keep_every
        require(every is None or every > 0, "keep_every", every, "a positive number or null")
        micro = self.micro_batch_size
        require(micro is None or micro > 0, "micro_batch_size", micro, "a positive number or null")
        h, w = self.data.image_hw
        p = self.model.patch_size
        require(h % p == 0 and w % p == 0, "data.image_size", [h, w], f"multiples of model.patch_size = {p}")
        self.objective.check(self)

    def resolved(self) -> Config:
        """The same run with every null that stands for a named model's value replaced by that value: for records."""
        model = replace(self.model, **self.model.size._asdict())
        return replace(self, model=model, objective=self.objective.resolved(self))

    @property
    def grid_h(self) -> int:
        return self.data.image_hw[0] // self.model.patch_size

    @property
    def grid_w(self) -> int:
        return self.data.image_hw[1] // self.model.patch_size

    @property
    def num_patches(self) -> int:
        return self.grid_h * self.grid_w
