"""Images, from their files to batches on a device.

| module | its job |
|---|---|
| `sources/` | find the images that `data.source` names, and list them |
| `dataset` | the list: name, label and place of every image; read its bytes |
| `order` | which images a step sees, and how they are cropped |
| `decode/` | headers, and pixels from bytes: on the CPU or with DALI |
| `image_errors`, `bad_samples` | images that cannot be used: the errors, and their count and names |
| `reader` | read images by index, with another one in the place of a bad one |
| `threads` | share the work on a batch out over threads |
| `loader` | batches for training, prepared ahead of the step |
| `evaluation` | batches for evaluation |
| `check/` | `fastjepa check`: look at every image before a run |

The samples, crops and masks of a run are functions of (seed, step) alone. So a run is resumed from its step number, and
it sees the same images on any number of ranks.
"""

from fastjepa.data.dataset import ImageDataset
from fastjepa.data.evaluation import evaluation_batches
from fastjepa.data.image_errors import BadImage, BadImages
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
