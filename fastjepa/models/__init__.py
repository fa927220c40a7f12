"""Vision transformer and predictor on packed tokens."""

from fastjepa.models.predictor import Predictor
from fastjepa.models.vision_transformer import VisionTransformer

__all__ = ["Predictor", "VisionTransformer"]
