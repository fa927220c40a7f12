"""Vision transformer and predictor on packed tokens."""

from fastjepa.models.vision_transformer import VisionTransformer
from fastjepa.objectives.ijepa.predictor import Predictor

__all__ = ["Predictor", "VisionTransformer"]
