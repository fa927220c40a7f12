"""Order and crops: pure, exact, and distributed as the published algorithm says."""

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2, ks_2samp

from fastjepa.config import DataConfig
from fastjepa.data.dataset import Ints
from fastjepa.data.order import (
    batch_positions,
    central_boxes,
    crop_boxes,
    dct_scale,
    epoch_order,
    flips,
    replacement,
    steps_per_epoch,
)
from fastjepa_kernels.philox import DOMAIN_CROP, philox4x32

Box = tuple[int, int, int, int]


def random_resized_crop(
    height: int, width: int, config: DataConfig, draws: Iterator[tuple[float, float, float, float]]
) -> Box:
    """RandomResizedCrop.get_params of torchvision for one image, written from its documentation.

    Args:
        height, width: of the image.
        config: the crop settings.
        draws: for each attempt, numbers in [0, 1) for area, aspect, top and left.
    """
    assert config.crop_scale is not None
    (s0, s1), (r0, r1) = config.crop_scale, config.crop_aspect
    for _ in range(10):
        u_area, u_aspect, u_top, u_left = next(draws)
        area = (s0 + u_area * (s1 - s0)) * (height * width)
        aspect = math.exp(math.log(r0) + u_aspect * (math.log(r1) - math.log(r0)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return math.floor(u_top * (height - h + 1)), math.floor(u_left * (width - w + 1)), h, w
    w, h = width, height
    if width / height < r0:
        h = round(width / r0)
    elif width / height > r1:
        w = round(height * r1)
    return (height - h) // 2, (width - w) // 2, h, w


def test_epoch_order_is_a_permutation_of_its_own_per_seed_and_epoch() -> None:
    orders = [epoch_order(seed, epoch, 1000) for seed in (0, 1, 2**63) for epoch in (0, 1, 2)]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(1000))
    assert len({order.tobytes() for order in orders}) == len(orders)
    np.testing.assert_array_equal(orders[4], epoch_order(1, 1, 1000))


def test_every_image_is_equally_likely_at_every_place() -> None:
    orders = np.stack([epoch_order(0, epoch, 8) for epoch in range(4000)])
    counts = np.stack([np.bincount(orders[:, place], minlength=8) for place in range(8)])
    # Rows and columns have fixed sums: (k - 1) / k of Pearson's statistic has a chi-square law with (k - 1)^2 degrees.
    statistic = 7 / 8 * float(((counts - 500) ** 2 / 500).sum())
    assert 0.001 < chi2.sf(statistic, 49) < 0.999


@pytest.mark.parametrize(("world", "micro", "accum"), [(1, 24, 1), (2, 12, 1), (3, 4, 2), (4, 1, 6), (1, 1, 24)])
def test_positions_of_all_ranks_and_micro_batches_are_the_global_batch(world: int, micro: int, accum: int) -> None:
    for step in (0, 5):
        parts = [
            batch_positions(step, k, rank, world_size=world, micro_batch_size=micro, accum=accum)
            for k in range(accum)
            for rank in range(world)
        ]
        np.testing.assert_array_equal(np.concatenate(parts), np.arange(step * 24, step * 24 + 24))


def test_a_batch_larger_than_the_data_set_is_refused_with_both_numbers() -> None:
    assert steps_per_epoch(100, 33) == 3
    with pytest.raises(ValueError, match=r"global_batch_size = 128.* 100 images"):
        steps_per_epoch(100, 128)


SIZES = [(375, 500), (500, 375), (28, 28), (1, 1), (30, 400), (400, 30), (7, 9), (1, 1000)]


@pytest.mark.parametrize("scale", [(0.3, 1.0), (0.05, 0.2), (0.9, 1.0)])
def test_crop_boxes_equal_a_loop_over_the_same_random_numbers(scale: tuple[float, float]) -> None:
    config = DataConfig(crop_scale=scale, dct_scaling=False)
    indices = np.arange(10_000, 10_000 + 400)
    sizes = np.array(SIZES, np.int32)[indices % len(SIZES)]
    boxes = crop_boxes(config, seed=3, epoch=11, indices=indices, sizes=sizes)
    for index, size, box in zip(indices, sizes, boxes, strict=True):
        words = philox4x32(np.arange(10), DOMAIN_CROP, int(index), 11, seed=3)
        draws = ((a, b, c, d) for a, b, c, d in (np.stack(words, 1) / 2**32).tolist())
        assert tuple(box) == random_resized_crop(int(size[0]), int(size[1]), config, draws)


def test_large_crops_begin_and_end_at_multiples_of_their_scale() -> None:
    """The boxes are those without DCT scaling, with every side rounded down to a multiple of k."""
    rng = np.random.default_rng(0)
    indices = np.arange(2000)
    sizes = rng.integers(60, 1200, (2000, 2)).astype(np.int32)
    exact, scaled = (
        crop_boxes(DataConfig(image_size=(24, 32), dct_scaling=on), seed=0, epoch=0, indices=indices, sizes=sizes)
        for on in (False, True)
    )
    scales = [max(k for k in (1, 2, 4, 8) if k == 1 or min(h / 24, w / 32) >= 2 * k) for _, _, h, w in exact.tolist()]
    assert set(scales) == {1, 2, 4, 8}
    expected = [[side // k * k for side in box] for box, k in zip(exact.tolist(), scales, strict=True)]
    assert scaled.tolist() == expected
    assert dct_scale(DataConfig(image_size=(24, 32)), *scaled[:, 2:].T).tolist() == scales


def _statistics(boxes: npt.NDArray[np.int_] | npt.NDArray[np.int32]) -> list[npt.NDArray[np.float64]]:
    """Top, left, area and aspect ratio."""
    top, left, height, width = boxes.astype(np.float64).T
    return [top, left, height * width, width / height]


@pytest.mark.parametrize("size", [(375, 500), (120, 400)])
def test_crop_boxes_have_the_distribution_of_the_algorithm(size: tuple[int, int]) -> None:
    """A loop with NumPy's generator is the reference, in two-sample Kolmogorov-Smirnov tests at level 0.001."""
    config = DataConfig()
    n = 4000
    rng = np.random.default_rng(1)
    loop = np.array([random_resized_crop(*size, config, iter(rng.random((10, 4)).tolist())) for _ in range(n)])
    ours = crop_boxes(config, seed=1, epoch=0, indices=np.arange(n), sizes=np.tile(np.array(size, np.int32), (n, 1)))
    for a, b in zip(_statistics(loop), _statistics(ours), strict=True):
        assert ks_2samp(a, b).pvalue > 0.001


def test_a_crop_depends_on_seed_epoch_and_its_own_index_only() -> None:
    config = DataConfig()
    indices = np.arange(64)
    sizes = np.tile(np.array([[375, 500]], np.int32), (64, 1))

    def boxes(seed: int, epoch: int, some: Ints) -> list[list[int]]:
        return crop_boxes(config, seed=seed, epoch=epoch, indices=indices[some], sizes=sizes[some]).tolist()

    shuffled = np.random.default_rng(0).permutation(64)
    everything = boxes(0, 0, indices)
    assert boxes(0, 0, shuffled) == [everything[i] for i in shuffled]
    assert boxes(0, 0, indices[5:6]) == everything[5:6]
    for other in (boxes(1, 0, indices), boxes(0, 1, indices)):
        assert sum(a == b for a, b in zip(everything, other, strict=True)) <= 1
    assert len({tuple(box) for box in everything}) > 60


@given(
    sizes=st.lists(st.tuples(st.integers(1, 3000), st.integers(1, 3000)), min_size=1, max_size=20),
    limits=st.lists(st.floats(0.01, 1.0), min_size=2, max_size=2).map(sorted),
    aspects=st.lists(st.floats(0.1, 10.0), min_size=2, max_size=2).map(sorted),
)
def test_boxes_lie_inside_the_image(sizes: list[tuple[int, int]], limits: list[float], aspects: list[float]) -> None:
    config = DataConfig(crop_scale=(limits[0], limits[1]), crop_aspect=(aspects[0], aspects[1]))
    array = np.array(sizes, np.int32)
    for boxes in (
        crop_boxes(config, seed=0, epoch=0, indices=np.arange(len(sizes)), sizes=array),
        central_boxes(DataConfig(image_size=(16, 224)), array),
    ):
        assert boxes.dtype == np.int32
        assert (boxes[:, :2] >= 0).all()
        assert (boxes[:, 2:] > 0).all()
        assert (boxes[:, :2] + boxes[:, 2:] <= array).all()


def test_flips_have_their_probability_and_depend_on_seed_epoch_and_index_only() -> None:
    indices = np.arange(10_000)

    def drawn(share: float, seed: int = 0, epoch: int = 0) -> npt.NDArray[np.bool_]:
        return flips(DataConfig(flip=share), seed=seed, epoch=epoch, indices=indices)

    assert not drawn(0.0).any()
    assert drawn(1.0).all()
    assert abs(drawn(0.3).mean() - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 10_000)
    np.testing.assert_array_equal(flips(DataConfig(flip=0.3), seed=0, epoch=0, indices=indices[7:9]), drawn(0.3)[7:9])
    for other in (drawn(0.5, seed=1), drawn(0.5, epoch=1)):
        assert 0.45 < (drawn(0.5) == other).mean() < 0.55
    # Independent of the crop: neither its first area nor its first position tells whether it is mirrored.
    boxes = crop_boxes(
        DataConfig(), seed=0, epoch=0, indices=indices, sizes=np.tile(np.array([[375, 500]], np.int32), (10_000, 1))
    )
    for column in _statistics(boxes):
        assert abs(np.corrcoef(column, drawn(0.5))[0, 1]) < 0.04


def test_replacements_are_spread_over_the_data_set() -> None:
    """A lost shard must not be replaced by one and the same image."""
    chosen = [replacement(index, 1, seed=3, epoch=2, num_images=50) for index in range(1000, 6000)]
    counts = np.bincount(chosen, minlength=50)
    assert 0.001 < chi2.sf(float(((counts - 100) ** 2 / 100).sum()), 49) < 0.999
    assert replacement(7, 1, seed=3, epoch=2, num_images=50) == replacement(7, 1, seed=3, epoch=2, num_images=50)
    others = [(8, 1, 3, 2), (7, 2, 3, 2), (7, 1, 4, 2), (7, 1, 3, 3)]
    values = {replacement(i, k, seed=s, epoch=e, num_images=2**30) for i, k, s, e in [(7, 1, 3, 2), *others]}
    assert len(values) == 5


def test_without_a_crop_scale_the_box_is_the_whole_image() -> None:
    boxes = crop_boxes(
        DataConfig(crop_scale=None), seed=0, epoch=0, indices=np.arange(2), sizes=np.array([[3, 4], [5, 6]], np.int32)
    )
    assert boxes.tolist() == [[0, 0, 3, 4], [0, 0, 5, 6]]


def test_central_boxes_are_the_largest_with_the_aspect_of_the_output() -> None:
    sizes = np.array([[375, 500], [500, 375], [28, 28], [100, 1000]], np.int32)
    assert central_boxes(DataConfig(), sizes).tolist() == [
        [0, 62, 375, 375],
        [62, 0, 375, 375],
        [0, 0, 28, 28],
        [0, 450, 100, 100],
    ]
    assert central_boxes(DataConfig(image_size=(100, 200)), sizes).tolist() == [
        [62, 0, 250, 500],
        [156, 0, 188, 375],
        [7, 0, 14, 28],
        [0, 400, 100, 200],
    ]
