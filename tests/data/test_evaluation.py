"""Images for evaluation: central, in the given order, and bad ones left out by name."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fastjepa.data.evaluation as evaluation
from fastjepa.config import Config, DataConfig
from fastjepa.data import ImageDataset, evaluation_batches, open_dataset
from fastjepa.data.decode.choice import choose_decoder
from fastjepa.data.decode.images import read_header
from fastjepa.data.order import central_boxes
from fastjepa.data.reader import sizes_of

CPU = torch.device("cpu")


def dataset_of(folder: Path) -> ImageDataset:
    dataset = open_dataset(DataConfig(source=str(folder)), "train")
    assert dataset is not None
    return dataset


def test_images_come_at_their_central_boxes_in_the_given_order(
    image_folder: Callable[[int], Path],
    make_config: Callable[..., Config],
    loader_name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(evaluation, "_AT_ONCE", 4)  # several batches, the last one smaller
    dataset, config = dataset_of(image_folder(13)), make_config(loader=loader_name).data
    wanted = np.array([5, 12, 0, 7, 7, 3])
    batches = [(indices, images.clone()) for indices, images in evaluation_batches(dataset, wanted, config, CPU)]
    assert [len(indices) for indices, _ in batches] == [4, 2]
    np.testing.assert_array_equal(np.concatenate([indices for indices, _ in batches]), wanted)
    decoder = choose_decoder(config, CPU, 1, ThreadPoolExecutor(2))
    for index, image in zip(wanted, torch.cat([images for _, images in batches]), strict=True):
        file = read_header(dataset.read(index, 10**6), 10**6)
        box = central_boxes(config, sizes_of([file]))
        assert torch.equal(decoder.decode([file], box, np.zeros(1, bool))[0], image)


def test_bad_images_are_left_out_and_named(
    image_folder: Callable[[int], Path],
    make_config: Callable[..., Config],
    loader_name: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Some are found by their header and some while decoding, and one batch is all bad; the others keep their own pixels."""
    monkeypatch.setattr(evaluation, "_AT_ONCE", 4)
    folder = image_folder(12)
    for i in range(12):  # plain images, by which they can be told apart
        Image.new("L", (40, 40), 10 * i).save(folder / f"{i:03d}.png")
    for i in (1, 8, 9, 10, 11):
        content = b"" if i % 2 else (folder / f"{i:03d}.png").read_bytes()[:60]
        (folder / f"{i:03d}.png").write_bytes(content)
    config = make_config(loader=loader_name).data
    with caplog.at_level(logging.WARNING):
        batches = list(evaluation_batches(dataset_of(folder), np.arange(12), config, CPU))
    assert [indices.tolist() for indices, _ in batches] == [[0, 2, 3], [4, 5, 6, 7]]
    for indices, images in batches:
        assert images.float().mean((1, 2, 3)).tolist() == (10 * indices).tolist()
    named = [message.partition(": ")[2].partition(": ")[0] for message in caplog.messages if "left out" in message]
    assert sorted(named) == ["001.png", "008.png", "009.png", "010.png", "011.png"]
