"""Images in: where they lie (sources), which and how they are cropped (order), decoding (pillow, dali), batches (loader).

The samples, crops and masks of a run are functions of (seed, step) alone, so a run is resumed from its step number and
sees the same images on any number of ranks.
"""

from fastjepa.data.images import BadImage, BadImages
from fastjepa.data.loader import Batch, Loader, choose_decoder, load_images
from fastjepa.data.order import steps_per_epoch
from fastjepa.data.sources import ImageDataset, open_dataset
from fastjepa.errors import DataError

__all__ = [
    "BadImage",
    "BadImages",
    "Batch",
    "DataError",
    "ImageDataset",
    "Loader",
    "choose_decoder",
    "load_images",
    "open_dataset",
    "steps_per_epoch",
]
