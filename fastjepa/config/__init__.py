"""Settings of a run: the dataclasses, the file and command line that they are read from, and the shares of a batch."""

from fastjepa.config.settings import (
    MODEL_SIZES,
    Config,
    DataConfig,
    KernelsConfig,
    ModelConfig,
    ModelSize,
    ObjectiveConfig,
    OptimConfig,
    Pair,
)

__all__ = [
    "MODEL_SIZES",
    "Config",
    "DataConfig",
    "KernelsConfig",
    "ModelConfig",
    "ModelSize",
    "ObjectiveConfig",
    "OptimConfig",
    "Pair",
]
