"""Evaluates a run: probes on the frozen encoder of its newest checkpoint."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastjepa_kernels
from fastjepa.checkpoint.format import load_weights, newest_first
from fastjepa.config import Config, DataConfig
from fastjepa.data import ImageDataset, evaluation_batches, normalise, open_dataset
from fastjepa.errors import CheckpointError, DataError
from fastjepa.evaluate.comparison import Report, Split, evaluate_features, format_report
from fastjepa.evaluate.probes import MIN_SAMPLES, representation_health
from fastjepa.objectives.registry import build_objective, load_config, method_of
from fastjepa.run.folder import RunFolder

logger = logging.getLogger(__name__)

ENCODED_AT_ONCE = 128
# Larger sets are thinned out evenly to these sizes: exact k-NN over all of ImageNet takes hours on a CPU.
MAX_TRAIN_IMAGES, MAX_TEST_IMAGES = 100_000, 50_000
MAX_IMAGES_FOR_HEALTH = 2048
# Larger images are downsampled to this many pixels a side before their raw pixels are probed.
MAX_PIXEL_GRID = 32


def load_encoder(run_folder: str | Path, part: str | None = None) -> nn.Module:
    """A part of a run's newest checkpoint that turns images [B, C, H, W] into features [B, N, D], in evaluation mode.

    Args:
        run_folder: output_dir of a run.
        part: its name; default: the one that the method evaluates (I-JEPA: target_encoder, as in the paper).

    Raises:
        CheckpointError: there is no checkpoint, no such part, or it is damaged or of another model.
    """
    folder = RunFolder(run_folder)
    method = method_of(load_config(folder.config))
    checkpoints = newest_first(folder.checkpoints)
    if not checkpoints:
        raise CheckpointError(f"{folder.path} holds no checkpoint: nothing to evaluate")
    newest, name = checkpoints[0], part or method.evaluated
    parts = {part.name: part.module for part in build_objective(method).parts}
    if name not in parts:
        raise CheckpointError(f"part {name}: expected one of {', '.join(parts)}")
    encoder, weights = parts[name], load_weights(newest, name)
    try:
        missing, unexpected = encoder.load_state_dict(weights, strict=False)
    except RuntimeError as error:  # it lists the tensors of other shapes
        raise CheckpointError(f"{newest} is of another model than {folder.config}: {error}") from error
    buffers = {name for name, _ in encoder.named_buffers()}
    lacking = [name for name in missing if name not in buffers]  # older files hold no position tables: made anew
    if lacking or unexpected:
        raise CheckpointError(f"{newest} is of another model: it lacks {lacking} and has {unexpected} too many")
    return encoder.eval()


def evaluate_run(folder: RunFolder, device: torch.device) -> Report | None:
    """Probe the run's encoder, print the report and write it to evaluation.json.

    With labels and a `val` split, the report compares the encoder with a random one and with raw pixels, by k-NN and linear
    probe. Without them there is no report (None): it is only printed whether the representations have collapsed.

    Raises:
        CheckpointError, DataError: the run or its images cannot be read.
    """
    config = load_config(folder.config)
    encoder = load_encoder(folder.path).to(device)
    train, test = (open_dataset(config.data, split) for split in ("train", "val"))
    assert train is not None
    if train.labels is None or test is None or test.labels is None:
        rows, (features,) = _features(train, MAX_IMAGES_FOR_HEALTH, config, device, [encoder])
        verdict = _too_few(rows) or representation_health(features).verdict() or "no sign of collapse"
        print(f"no labelled train and val splits in {config.data.source}, so no probes; {verdict}", flush=True)
        return None
    if not set(train.class_names) & set(test.class_names):
        raise DataError(
            f"none of the held-out images' classes ({', '.join(test.class_names[:5])}, ...) is one of the training images' "
            f"({', '.join(train.class_names[:5])}, ...): expected the same names in both"
        )
    method = method_of(config)
    random = build_objective(method).part(method.evaluated).to(device)
    kinds: list[Callable[[Tensor], Tensor]] = [encoder, random, functools.partial(_pixels, config.data)]
    train_rows, train_features = _features(train, MAX_TRAIN_IMAGES, config, device, kinds)
    if few := _too_few(train_rows):
        print(f"no probes: {few}", flush=True)
        return None
    test_rows, test_features = _features(test, MAX_TEST_IMAGES, config, device, kinds)
    learned_split, random_split, pixel_split = (
        Split(*both) for both in zip(train_features, test_features, strict=True)
    )
    test_labels = test.labels_by(train.class_names)
    assert test_labels is not None
    labels = Split(torch.from_numpy(train.labels[train_rows]), torch.from_numpy(test_labels[test_rows]))
    try:
        report = evaluate_features(learned_split, random_split, pixel_split, labels)
    except ValueError as error:
        raise DataError(f"data.source = {config.data.source} cannot be probed: {error}") from error
    folder.write_evaluation(json.dumps(report.to_dict(), indent=2) + "\n")
    print(format_report(report), flush=True)
    return report


def _too_few(rows: npt.NDArray[np.int64]) -> str | None:
    return f"{len(rows)} images are too few to judge ({MIN_SAMPLES} are needed)" if len(rows) < MIN_SAMPLES else None


def _pixels(config: DataConfig, images: Tensor) -> Tensor:
    """Raw pixels in the form of an encoder with one token: uint8 [B, C, H, W] -> normalised [B, 1, C * h * w]."""
    height, width = images.shape[2:]
    grid = (min(height, MAX_PIXEL_GRID), min(width, MAX_PIXEL_GRID))
    return F.adaptive_avg_pool2d(normalise(images, config), grid).flatten(1)[:, None]


@torch.no_grad()
@fastjepa_kernels.without_requests()  # the encoder runs in fp32 here, whatever training requested
def _features(
    dataset: ImageDataset,
    at_most: int,
    config: Config,
    device: torch.device,
    encoders: Sequence[Callable[[Tensor], Tensor]],
) -> tuple[npt.NDArray[np.int64], list[Tensor]]:
    """Compute features, averaged over the patches, of up to `at_most` images spread evenly over the data set.

    Returns:
        The images' indices, int64 [n], and for each encoder the features, fp32 [n, D], on the CPU. Bad images are left out,
        with a warning.

    Raises:
        DataError: none of the images can be used.
    """
    wanted = np.linspace(0, len(dataset) - 1, min(len(dataset), at_most)).astype(np.int64)
    kept: list[npt.NDArray[np.int64]] = []
    pooled: list[list[Tensor]] = [[] for _ in encoders]
    for indices, images in evaluation_batches(dataset, wanted, config.data, device):
        kept.append(indices)
        for encoder, batches in zip(encoders, pooled, strict=True):
            batches += [encoder(part).mean(1).float().cpu() for part in images.split(ENCODED_AT_ONCE)]
    if not kept:
        raise DataError(f"{dataset.root}: none of its images can be used for the evaluation")
    return np.concatenate(kept), [torch.cat(batches) for batches in pooled]
