"""Evaluation of a run: probes on the frozen target encoder of its newest checkpoint."""

from __future__ import annotations

import json
import logging

import numpy as np
import torch
from torch import Tensor, nn

from fastjepa import checkpoint
from fastjepa.config import Config
from fastjepa.config_file import load_config
from fastjepa.data import ImageDataset, load_images, open_dataset
from fastjepa.errors import CheckpointError
from fastjepa.evaluate.probes import representation_health
from fastjepa.evaluate.report import Report, Split, evaluate_features, format_report
from fastjepa.models import VisionTransformer
from fastjepa.objective import build_model
from fastjepa.run_folder import RunFolder

logger = logging.getLogger(__name__)

BATCH_SIZE = 256
MAX_IMAGES_FOR_HEALTH = 2048


@torch.inference_mode()
def pooled_features(encoder: nn.Module, images: Tensor) -> Tensor:
    """Images [n, C, H, W] -> features averaged over the patches, [n, D], fp32, on the CPU."""
    encoder.eval()
    return torch.cat([encoder(batch).mean(1).float().cpu() for batch in images.split(BATCH_SIZE)])


def load_target_encoder(folder: RunFolder, config: Config) -> VisionTransformer:
    """The target encoder (the EMA, which the paper evaluates) of the run's newest checkpoint.

    Raises:
        CheckpointError: there is none, or it is damaged or of another model.
    """
    newest = checkpoint.latest(folder.checkpoints)
    if newest is None:
        raise CheckpointError(f"{folder.path} holds no checkpoint: nothing to evaluate")
    encoder = VisionTransformer(config)
    missing, unexpected = encoder.load_state_dict(checkpoint.load_weights(newest, "target_encoder"), strict=False)
    lacking = [name for name in missing if name != "pos_embed"]  # fixed, made anew
    if lacking or unexpected:
        raise CheckpointError(f"{newest} is of another model: it lacks {lacking} and has {unexpected} too many")
    return encoder


def evaluate_run(folder: RunFolder, device: torch.device) -> Report | None:
    """Print what the run learned and write it to evaluation.json.

    With labels and a `val` split: k-NN and linear probe beside a random encoder and raw pixels. Without: whether the
    representations collapsed, and no report.

    Raises:
        CheckpointError, DataError: the run or its images cannot be read.
    """
    config = load_config(folder.config)
    encoder = load_target_encoder(folder, config).to(device)
    train = open_dataset(config.data.source, "train")
    test = open_dataset(config.data.source, "val")
    assert train is not None
    if train.labels is None or test is None or test.labels is None:
        sample = np.linspace(0, len(train) - 1, min(len(train), MAX_IMAGES_FOR_HEALTH)).astype(np.int64)
        features = pooled_features(encoder, load_images(train, sample, config.data, device))
        health = representation_health(features)
        print(
            f"no labelled train and val splits in {config.data.source}: no probes. {health.verdict() or 'No sign of collapse'}"
        )
        return None
    images = Split(_all_images(train, config, device), _all_images(test, config, device))
    random = build_model(config).target_encoder.to(device)
    report = evaluate_features(
        learned=Split(*(pooled_features(encoder, x) for x in images)),
        random=Split(*(pooled_features(random, x) for x in images)),
        pixels=Split(*(x.flatten(1).cpu() for x in images)),
        labels=Split(torch.from_numpy(train.labels), torch.from_numpy(test.labels)),
    )
    folder.evaluation.write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")
    print(format_report(report), flush=True)
    return report


def _all_images(dataset: ImageDataset, config: Config, device: torch.device) -> Tensor:
    return load_images(dataset, np.arange(len(dataset)), config.data, device)
