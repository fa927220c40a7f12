"""Where images come from: what `data.source` may name, and which of its images belong to a split.

| `data.source` | what it is |
|---|---|
| `fashion_mnist` | the data set inside the package (`embedded`) |
| a folder of images | nested to any depth; class folders give labels (`folder`) |
| tar shards: a folder, a file, or a pattern such as `train-{0000..0146}.tar` | WebDataset (`webdataset`) |
| Arrow or Parquet files: a folder, a file, or a pattern | Hugging Face data sets on disk (`tables`) |
| a text file | one image path a line, and a label behind a tab (`list_file`) |

A folder that has a sub-folder `train` is split: `train` is for training, and the first of `val`, `validation`, `valid`,
`test` that exists is held out. Shards and tables are split in the same way if all their names hold one of these words.
Anything else is all `train` (`splits`).

A source lists its images once. The list is cached with a checksum, and is made again when the source has changed (`index`).
"""

from fastjepa.data.sources.splits import open_dataset

__all__ = ["open_dataset"]
