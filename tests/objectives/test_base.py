"""What the contract gives every method: views of an image, and the parts of an objective."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from torch import nn

from fastjepa.config import DataConfig
from fastjepa.data import open_dataset
from fastjepa.data.bad_samples import BadSamples
from fastjepa.data.decode.choice import choose_decoder
from fastjepa.data.order import crop_boxes, flips
from fastjepa.data.reader import Images, Reader, ViewDecoder
from fastjepa.objectives.base import Objective, Output, Part, Prepared, View
from fastjepa.objectives.registry import method_of
from tests.support.small import small_batch, small_config

DATA = DataConfig(image_size=32, in_channels=1, mean=(0.5,), std=(0.25,), flip=0.5, loader="turbo", num_threads=2)
INDICES = np.arange(500)
SIZES = np.tile(np.array([[375, 500]], np.int32), (500, 1))


# Views


def boxes_of(view: int, *, seed: int = 3, epoch: int = 2, some: slice = slice(None)) -> npt.NDArray[np.int32]:
    return crop_boxes(DATA, seed=seed, epoch=epoch, indices=INDICES[some], sizes=SIZES[some], view=view)


def flips_of(view: int, *, seed: int = 3, epoch: int = 2, some: slice = slice(None)) -> npt.NDArray[np.bool_]:
    return flips(DATA, seed=seed, epoch=epoch, indices=INDICES[some], view=view)


def test_the_view_of_the_data_settings_has_their_crop() -> None:
    view = View.of(DATA)
    assert view.settings(DATA) == replace(DATA, image_size=(32, 32))
    smaller = View(image_size=(16, 24), crop_scale=(0.05, 0.3), crop_aspect=(0.5, 2.0))
    assert smaller.settings(DATA) == replace(
        DATA, image_size=(16, 24), crop_scale=(0.05, 0.3), crop_aspect=(0.5, 2.0), flip=0.0
    )


def test_a_method_has_one_view_as_the_data_settings_describe_it_by_default() -> None:
    config = small_config()
    assert method_of(config).views == (View.of(config.data),)


def test_the_first_view_is_what_a_run_with_a_single_view_draws() -> None:
    single = crop_boxes(DATA, seed=3, epoch=2, indices=INDICES, sizes=SIZES)
    np.testing.assert_array_equal(boxes_of(0), single)
    np.testing.assert_array_equal(flips_of(0), flips(DATA, seed=3, epoch=2, indices=INDICES))


def test_views_of_an_image_have_different_crops_and_independent_flips() -> None:
    boxes = [boxes_of(view) for view in range(3)]
    mirrored = [flips_of(view) for view in range(3)]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert (boxes[a] == boxes[b]).all(1).sum() <= 2
        assert 0.42 < (mirrored[a] == mirrored[b]).mean() < 0.58
        for column in range(4):
            correlation = np.corrcoef(boxes[a][:, column], boxes[b][:, column])[0, 1]
            assert abs(correlation) < 0.18  # four standard deviations for 500 independent images


@pytest.mark.parametrize("view", [0, 1, 9])
def test_a_view_is_a_pure_function_of_seed_epoch_and_index(view: int) -> None:
    boxes, mirrored = boxes_of(view), flips_of(view)
    np.testing.assert_array_equal(boxes_of(view), boxes)
    np.testing.assert_array_equal(boxes_of(view, some=slice(100, 103)), boxes[100:103])
    np.testing.assert_array_equal(flips_of(view, some=slice(100, 103)), mirrored[100:103])
    for other in ({"seed": 4}, {"epoch": 3}):
        assert (boxes_of(view, **other) == boxes).all(1).sum() <= 2  # type: ignore[arg-type]
        assert 0.42 < (flips_of(view, **other) == mirrored).mean() < 0.58  # type: ignore[arg-type]


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as executor:
        yield executor


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve grey images of noise, the sixth of which is damaged."""
    rng = np.random.default_rng(0)
    for i in range(12):
        Image.fromarray(rng.integers(0, 256, (60 + i, 50 + i), dtype=np.uint8)).save(tmp_path / f"{i:03d}.png")
    (tmp_path / "005.png").write_bytes((tmp_path / "005.png").read_bytes()[:300])
    return tmp_path


def read_views(folder: Path, views: list[View], pool: ThreadPoolExecutor, *, epoch: int = 0) -> Images:
    data = replace(DATA, source=str(folder), max_bad_share=1.0)
    dataset = open_dataset(data, "train")
    assert dataset is not None
    settings = [view.settings(data) for view in views]
    decoders = [ViewDecoder(each, choose_decoder(each, torch.device("cpu"), 8, pool)) for each in settings]
    reader = Reader(dataset, decoders, 3, pool, BadSamples(dataset, 1.0, None))
    return reader.read(np.array([7, 0, 5, 11]), epoch)


def test_two_views_are_two_crops_of_each_image_and_the_first_is_that_of_a_single_view(
    folder: Path, pool: ThreadPoolExecutor
) -> None:
    first = View.of(DATA)
    second = View(image_size=(16, 24), crop_scale=(0.05, 0.3), crop_aspect=(0.5, 2.0), flip=0.5)
    single, both = read_views(folder, [first], pool), read_views(folder, [first, second], pool)
    assert [tuple(pixels.shape) for pixels in both.pixels] == [(4, 1, 32, 32), (4, 1, 16, 24)]
    assert torch.equal(both.pixels[0], single.pixels[0])
    np.testing.assert_array_equal(both.boxes[0], single.boxes[0])
    np.testing.assert_array_equal(both.flips[0], single.flips[0])
    np.testing.assert_array_equal(both.sample_ids, single.sample_ids)
    assert both.sample_ids[2] != 5  # the replacement of the damaged image stands in all views
    assert (both.boxes[0] != both.boxes[1]).any(1).all()


def test_two_views_with_the_same_settings_differ_and_come_back_the_same(folder: Path, pool: ThreadPoolExecutor) -> None:
    views = [View.of(DATA), View.of(DATA)]
    images, again, later = (read_views(folder, views, pool, epoch=epoch) for epoch in (0, 0, 1))
    for view in range(2):
        assert torch.equal(images.pixels[view], again.pixels[view])
        assert not torch.equal(images.pixels[view], later.pixels[view])
    for one, other in zip(*images.pixels, strict=True):
        assert not torch.equal(one, other)


# Objectives


class TwoParts(Objective):
    """A linear layer and its average; the loss is the mean of what the layer makes of a micro batch's images."""

    def __init__(self) -> None:
        super().__init__()
        self.trained, self.average = nn.Linear(2, 3), nn.Linear(2, 3)

    @property
    def parts(self) -> tuple[Part, ...]:
        return Part("trained", self.trained), Part("average", self.average, averages="trained")

    def compute(self, batch: Prepared) -> Output:
        made = self.trained(batch.tensors()[0].flatten(1)[:, :2])
        return Output(made.float().mean(), {"in_bf16": torch.tensor(float(made.dtype == torch.bfloat16))})


def test_parts_are_found_by_name_and_only_those_that_are_no_averages_are_trained() -> None:
    objective = TwoParts()
    assert objective.part("average") is objective.average
    assert {id(p) for p in objective.trained_parameters()} == {id(p) for p in objective.trained.parameters()}
    assert objective.state() == {}


@pytest.mark.parametrize(("autocast", "in_bf16"), [(None, 0.0), (torch.bfloat16, 1.0)])
def test_autocast_is_entered_where_it_is_asked_for(autocast: torch.dtype | None, in_bf16: float) -> None:
    output = TwoParts()(small_batch(small_config()), autocast)
    assert output.loss.dtype == torch.float32
    assert float(output.signals["in_bf16"]) == in_bf16
