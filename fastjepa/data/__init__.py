"""Images in: where they lie (sources, dataset, index), which and how they are cropped (order), decoding (turbo, dali,
decoders), what is done about bad ones (reader, bad_samples), batches (loader, evaluation).

The samples, crops and masks of a run are functions of (seed, step) alone, so a run is resumed from its step number and
sees the same images on any number of ranks.
"""

from fastjepa.data.dataset import ImageDataset
from fastjepa.data.decode.images import BadImage, BadImages
from fastjepa.data.evaluation import evaluation_batches
from fastjepa.data.loader import Batch, Loader, Seconds, normalise
from fastjepa.data.order import steps_per_epoch
from fastjepa.data.sources import open_dataset
from fastjepa.errors import DataError

__all__ = [
    "BadImage",
    "BadImages",
    "Batch",
    "DataError",
    "ImageDataset",
    "Loader",
    "Seconds",
    "evaluation_batches",
    "normalise",
    "open_dataset",
    "steps_per_epoch",
]
