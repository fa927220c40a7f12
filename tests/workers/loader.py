"""One rank of tests/data/test_resume.py: iterates over a Loader and writes what each image of each step was.

usage: python -m tests.workers.loader SOURCE OUTPUT RANK WORLD_SIZE START_STEP
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from pathlib import Path

import torch

from fastjepa.config import Config, DataConfig, ModelConfig
from fastjepa.data import Batch, Loader, open_dataset
from fastjepa.objectives.ijepa.block_sizes import MaskConfig
from fastjepa.objectives.ijepa.objective import MaskedImages
from fastjepa.objectives.ijepa.settings import IJEPAConfig
from fastjepa.objectives.registry import method_of

GLOBAL_BATCH, STEPS = 12, 40


def run_config(source: str) -> Config:
    data = DataConfig(
        source=source,
        image_size=32,
        in_channels=1,
        mean=(0.5,),
        std=(0.25,),
        flip=0.5,
        num_threads=1,
        max_bad_share=0.5,
    )
    objective = IJEPAConfig(masks=MaskConfig(min_keep=5))
    return Config(seed=11, data=data, model=ModelConfig(name="vit_tiny", patch_size=8), objective=objective)


def describe(batch: Batch) -> list[list[object]]:
    """The index, crop and flip of each image, and a hash of its pixels and masks."""
    assert isinstance(batch.prepared, MaskedImages)
    pixels, masks = batch.prepared.images, batch.prepared.masks
    (boxes,), (mirrored,) = batch.boxes, batch.flips  # one view
    blocks = masks.target_lengths.num_seqs // masks.num_images
    context, target = masks.context_lengths.cu_seqlens.tolist(), masks.target_lengths.cu_seqlens[::blocks].tolist()
    images = []
    for i, index in enumerate(batch.sample_ids.tolist()):
        digest = hashlib.sha256(pixels[i].numpy().tobytes())
        for indices, ends in ((masks.context_indices, context), (masks.target_indices, target)):
            digest.update((indices[ends[i] : ends[i + 1]] - i * masks.num_patches).numpy().tobytes())
        images.append([index, boxes[i].tolist(), bool(mirrored[i]), digest.hexdigest()[:16]])
    return images


def main(source: str, output: Path, rank: int, world_size: int, start_step: int) -> None:
    torch.set_num_threads(1)
    config = run_config(source)
    dataset = open_dataset(config.data, "train")
    assert dataset is not None
    loader = Loader(
        dataset,
        config,
        method_of(config),
        rank=rank,
        world_size=world_size,
        micro_batch_size=GLOBAL_BATCH // world_size,
        grad_accum_steps=1,
        steps_per_epoch=len(dataset) // GLOBAL_BATCH,
        start_step=start_step,
        total_steps=STEPS,
        device=torch.device("cpu"),
        bad_samples_file=output.parent / "bad_samples.jsonl",
    )
    with loader, output.open("a", encoding="utf-8") as file:
        for step, batch in enumerate(loader, start_step):
            file.write(json.dumps([step, describe(batch)]) + "\n")
            file.flush()
            time.sleep(0.02)  # stands for a step, during which the process may be killed


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:]))
