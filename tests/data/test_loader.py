"""The loader gives the same samples, crops and masks however a run is split or resumed, and replaces bad images."""

import gc
import itertools
import json
import os
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fastjepa.config import Config, DataConfig
from fastjepa.data import Batch, DataError, ImageDataset, Loader, open_dataset
from fastjepa.data.decode.choice import choose_decoder
from fastjepa.data.decode.images import read_header
from fastjepa.data.order import crop_boxes, epoch_order, flips, replacement
from fastjepa.data.reader import sizes_of
from fastjepa.objectives.base import Moment
from fastjepa.objectives.ijepa.masks import sample_masks
from fastjepa.objectives.ijepa.method import IJEPA
from fastjepa.objectives.ijepa.objective import MaskedImages
from fastjepa.objectives.ijepa.settings import IJEPAConfig
from fastjepa.objectives.registry import method_of

CPU = torch.device("cpu")
MakeConfig = Callable[..., Config]
ImageFolder = Callable[[int], Path]
BATCH = 12


def dataset_of(folder: Path) -> ImageDataset:
    dataset = open_dataset(DataConfig(source=str(folder)), "train")
    assert dataset is not None
    return dataset


def make_loader(
    dataset: ImageDataset,
    config: Config,
    *,
    rank: int = 0,
    world: int = 1,
    micro: int = BATCH,
    accum: int = 1,
    start: int = 0,
    stop: int = 9,
    device: torch.device = CPU,
    bad_samples_file: Path | None = None,
) -> Loader:
    """A loader of global batches of 12 by default."""
    return Loader(
        dataset,
        config,
        method_of(config),
        rank=rank,
        world_size=world,
        micro_batch_size=micro,
        grad_accum_steps=accum,
        steps_per_epoch=len(dataset) // (world * micro * accum),
        start_step=start,
        total_steps=stop,
        device=device,
        bad_samples_file=bad_samples_file,
    )


def load(folder: Path, config: Config, **split: int) -> list[Batch]:
    """All batches of a loader; `split` are arguments of `make_loader`."""
    with make_loader(dataset_of(folder), config, **split) as batches:  # type: ignore[arg-type]
        return list(batches)


def prepared(batch: Batch) -> MaskedImages:
    """The images of a batch and their masks."""
    assert isinstance(batch.prepared, MaskedImages)
    return batch.prepared


def samples(batches: list[Batch]) -> list[tuple[int, bytes, tuple[list[int], bool], list[int], list[int]]]:
    """The index, pixels, crop and flip, context and target patches of each image, in order."""
    seen = []
    for batch in batches:
        images, masks = prepared(batch).images, prepared(batch).masks
        context, target = masks.context_lengths.cu_seqlens.tolist(), masks.target_lengths.cu_seqlens.tolist()
        blocks = masks.target_lengths.num_seqs // masks.num_images
        (boxes,), (mirrored,) = batch.boxes, batch.flips  # one view
        for i, index in enumerate(batch.sample_ids.tolist()):
            c = masks.context_indices[context[i] : context[i + 1]] - i * masks.num_patches
            t = masks.target_indices[target[i * blocks] : target[(i + 1) * blocks]] - i * masks.num_patches
            crop = boxes[i].tolist(), bool(mirrored[i])
            seen.append((index, images[i].numpy().tobytes(), crop, c.tolist(), t.tolist()))
    return seen


def test_an_epoch_holds_each_image_once(image_folder: ImageFolder, make_config: MakeConfig) -> None:
    epochs = load(image_folder(37), make_config(loader="turbo"), stop=6)  # 3 steps of 12; one image is left out
    for batches in (epochs[:3], epochs[3:]):
        assert len(set(np.concatenate([batch.sample_ids for batch in batches]))) == 36
    assert [b.sample_ids.tolist() for b in epochs[:3]] != [b.sample_ids.tolist() for b in epochs[3:]]


def test_a_batch_equals_the_pure_functions_of_seed_step_and_index(
    image_folder: ImageFolder, make_config: MakeConfig, loader_name: str
) -> None:
    config = make_config(loader=loader_name, flip=0.5)
    dataset = dataset_of(image_folder(29))  # 2 steps of 12 in an epoch
    decoder = choose_decoder(config.data, CPU, BATCH, ThreadPoolExecutor(2))
    with make_loader(dataset, config, stop=5) as loader:
        for step, batch in enumerate(loader):
            epoch, first = step // 2, step % 2 * BATCH
            indices = epoch_order(config.seed, epoch, 29)[first : first + BATCH]
            np.testing.assert_array_equal(batch.sample_ids, indices)
            images = [read_header(dataset.read(index, 10**6), 10**8) for index in indices]
            boxes = crop_boxes(config.data, seed=config.seed, epoch=epoch, indices=indices, sizes=sizes_of(images))
            mirrored = flips(config.data, seed=config.seed, epoch=epoch, indices=indices)
            np.testing.assert_array_equal(batch.boxes, [boxes])
            np.testing.assert_array_equal(batch.flips, [mirrored])
            assert torch.equal(prepared(batch).images, decoder.decode(images, boxes, mirrored))
            positions = torch.arange(step * BATCH, (step + 1) * BATCH)
            settings = IJEPAConfig.of(config).masks
            masks = sample_masks(settings, 4, 4, seed=config.seed, step=step, sample_indices=positions)
            assert torch.equal(prepared(batch).masks.predictor_rows, masks.predictor_rows)
            assert torch.equal(prepared(batch).masks.target_indices, masks.target_indices)


@pytest.mark.parametrize(("world", "micro", "accum"), [(1, 4, 3), (2, 6, 1), (3, 2, 2)])
def test_another_split_sees_the_same_samples_crops_and_masks(
    image_folder: ImageFolder, make_config: MakeConfig, world: int, micro: int, accum: int
) -> None:
    folder, config = image_folder(37), make_config(loader="turbo")
    ranks = [load(folder, config, rank=rank, world=world, micro=micro, accum=accum, stop=5) for rank in range(world)]
    split = list(itertools.chain.from_iterable(zip(*ranks, strict=True)))
    assert samples(split) == samples(load(folder, config, stop=5))


def test_a_resumed_run_goes_on_exactly_where_it_was(
    image_folder: ImageFolder, make_config: MakeConfig, loader_name: str
) -> None:
    folder, config = image_folder(37), make_config(loader=loader_name)
    whole = samples(load(folder, config, stop=7))
    assert len(whole) == 7 * BATCH
    for step in (1, 3, 4, 6):
        assert samples(load(folder, config, start=step, stop=7)) == whole[step * BATCH :]


def test_both_decoders_see_the_same_samples_crops_and_masks(image_folder: ImageFolder, make_config: MakeConfig) -> None:
    pytest.importorskip("nvidia.dali", reason="needs DALI")
    folder = image_folder(13)
    turbo, dali = (load(folder, make_config(loader=name, flip=0.5), stop=3) for name in ("turbo", "dali"))
    for t, d in zip(turbo, dali, strict=True):
        np.testing.assert_array_equal(t.sample_ids, d.sample_ids)
        np.testing.assert_array_equal(t.boxes, d.boxes)
        # The pixels are noise: another crop would differ by 80 levels of 255 on average.
        assert (prepared(t).images.float() - prepared(d).images.float()).abs().mean() < 4


def test_normalised_pixels_are_those_of_uint8_per_channel(
    image_folder: ImageFolder, make_config: MakeConfig, loader_name: str
) -> None:
    settings = {"in_channels": 3, "mean": (0.1, 0.2, 0.3), "std": (0.5, 0.25, 0.2), "loader": loader_name}
    folder = image_folder(12)
    plain, normalised = (
        prepared(load(folder, make_config(pixels=pixels, **settings), stop=1)[0]) for pixels in ("uint8", "normalised")
    )
    assert (plain.images.dtype, normalised.images.dtype) == (torch.uint8, torch.float32)
    scaled = plain.images.double().permute(0, 2, 3, 1) / 255
    expected = (scaled - torch.tensor([0.1, 0.2, 0.3])) / torch.tensor([0.5, 0.25, 0.2])
    torch.testing.assert_close(normalised.images.permute(0, 2, 3, 1).double(), expected, atol=1e-5, rtol=0)


def test_a_batch_holds_the_seconds_of_each_stage_of_its_preparation(
    image_folder: ImageFolder, make_config: MakeConfig, loader_name: str
) -> None:
    for batch in load(image_folder(12), make_config(loader=loader_name), stop=2):
        assert batch.seconds._fields == ("read", "decode", "to_device", "prepare")
        assert min(batch.seconds) > 0
        assert sum(batch.seconds) < 60


def test_too_few_images_for_a_batch_are_refused_with_both_numbers(
    image_folder: ImageFolder, make_config: MakeConfig
) -> None:
    dataset, config = dataset_of(image_folder(5)), make_config()
    with pytest.raises(ValueError, match=r"global batch of 12 images: the data set has 5"):
        Loader(
            dataset,
            config,
            method_of(config),
            rank=0,
            world_size=1,
            micro_batch_size=12,
            grad_accum_steps=1,
            steps_per_epoch=1,
            start_step=0,
            total_steps=1,
            device=CPU,
        )


# Bad images


def spoil(folder: Path, index: int, content: bytes) -> None:
    (folder / f"{index:03d}.png").write_bytes(content)


def stand_in(index: int, epoch: int, bad: set[int], n: int, seed: int = 7) -> int:
    """The image that stands in for a bad one by the documented rule, written as a loop."""
    candidates = (replacement(index, k, seed=seed, epoch=epoch, num_images=n) for k in itertools.count(1))
    return index if index not in bad else next(candidate for candidate in candidates if candidate not in bad)


@pytest.mark.parametrize("kind", ["zero-byte", "text", "truncated", "too many pixels", "missing"])
def test_a_bad_image_is_replaced_by_the_rule_counted_and_named_once(
    image_folder: ImageFolder, make_config: MakeConfig, loader_name: str, kind: str, tmp_path: Path
) -> None:
    folder = image_folder(13)
    config = make_config(loader=loader_name, max_pixels=2500)
    good = {i: (folder / f"{i:03d}.png").read_bytes() for i in (4, 5)}
    dataset = dataset_of(folder)
    expected = samples(load(folder, config, stop=4))
    for i, content in good.items():
        if kind == "missing":
            (folder / f"{i:03d}.png").unlink()
        elif kind == "too many pixels":
            Image.new("L", (60, 60)).save(folder / f"{i:03d}.png")
        else:
            spoil(folder, i, {"zero-byte": b"", "text": b"text " * 50, "truncated": content[: len(content) // 2]}[kind])
    with make_loader(dataset, config, stop=4, bad_samples_file=tmp_path / "bad.jsonl") as loader:
        batches = list(loader)
    assert len(loader.bad_samples) == 2
    entries = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert sorted((entry["index"], entry["name"]) for entry in entries) == [(4, "004.png"), (5, "005.png")]
    assert all(entry["reason"] for entry in entries)
    for epoch, batch in enumerate(batches):  # an epoch has one step here
        step = expected[epoch * BATCH : (epoch + 1) * BATCH]
        assert batch.sample_ids.tolist() == [stand_in(sample[0], epoch, {4, 5}, 13) for sample in step]
        own = {sample[0]: sample[1] for sample in step}
        for sample, before in zip(samples([batch]), step, strict=True):
            assert sample[3:] == before[3:]  # masks belong to the place in the batch
            assert sample[1] == own.get(sample[0], sample[1])  # the replacement has the crop of its own index


def test_images_that_vanish_or_are_cut_during_the_run_are_replaced(
    image_folder: ImageFolder, make_config: MakeConfig, loader_name: str
) -> None:
    folder = image_folder(12)
    with make_loader(dataset_of(folder), make_config(loader=loader_name, prefetch=1), stop=30) as loader:
        first = next(loader)
        assert sorted(first.sample_ids) == list(range(12))
        (folder / "002.png").unlink()
        spoil(folder, 7, (folder / "007.png").read_bytes()[:100])
        last = list(loader)[-1]
    assert len(loader.bad_samples) == 2
    assert not set(last.sample_ids) & {2, 7}


def test_with_bad_images_a_resumed_or_split_run_sees_the_same_samples(
    image_folder: ImageFolder, make_config: MakeConfig, loader_name: str
) -> None:
    folder, config = image_folder(37), make_config(loader=loader_name)
    for i in (0, 8, 9, 36):
        spoil(folder, i, (folder / f"{i:03d}.png").read_bytes()[:300])
    whole = samples(load(folder, config, stop=7))
    assert samples(load(folder, config, start=4, stop=7)) == whole[4 * BATCH :]
    ranks = [load(folder, config, rank=rank, world=2, micro=6, stop=7) for rank in range(2)]
    assert samples(list(itertools.chain.from_iterable(zip(*ranks, strict=True)))) == whole


def test_too_many_bad_images_stop_the_run_and_are_named(
    image_folder: ImageFolder, make_config: MakeConfig, loader_name: str, tmp_path: Path
) -> None:
    folder, config = image_folder(37), make_config(loader=loader_name, max_bad_share=0.1)
    for i in range(5, 30, 5):
        spoil(folder, i, b"")
    match = (
        r"[45] of 37 images are bad, more than data\.max_bad_share = 0\.1; the latest are .*0[0-9]+\.png.*"
        r"bad\.jsonl names them all"
    )
    loader = make_loader(dataset_of(folder), config, bad_samples_file=tmp_path / "bad.jsonl")
    with pytest.raises(DataError, match=match), loader:
        list(loader)
    assert len((tmp_path / "bad.jsonl").read_text().splitlines()) >= 4


def test_a_folder_of_bad_images_only_is_an_error_that_says_so(
    image_folder: ImageFolder, make_config: MakeConfig, loader_name: str
) -> None:
    folder = image_folder(12)
    for i in range(12):
        spoil(folder, i, b"not an image" if i % 2 else (folder / f"{i:03d}.png").read_bytes()[:300])
    with pytest.raises(DataError, match=r"images: 12 of 12 images are bad.*the log names them all"):
        load(folder, make_config(loader=loader_name))


# Threads


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("fastjepa")]


def test_an_error_in_the_thread_is_raised_with_its_traceback(
    image_folder: ImageFolder, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail_to_prepare(self: IJEPA, views: object, sample_indices: object, moment: Moment) -> None:
        raise ZeroDivisionError(f"at step {moment.step}")

    monkeypatch.setattr(IJEPA, "prepare", fail_to_prepare)
    loader = make_loader(dataset_of(image_folder(12)), make_config(loader="turbo"))
    with pytest.raises(ZeroDivisionError, match="at step 0") as caught:
        next(loader)
    assert "fail_to_prepare" in [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert list(loader) == []  # the loader is closed


@pytest.mark.parametrize("how", ["close", "with", "garbage collection", "error"])
def test_no_thread_outlives_the_loader(image_folder: ImageFolder, make_config: MakeConfig, how: str) -> None:
    gc.collect()
    before = set(loader_threads())
    loader = make_loader(dataset_of(image_folder(12)), make_config(loader="turbo"), stop=100_000)
    next(loader)
    assert set(loader_threads()) - before
    if how == "close":
        loader.close()
    elif how == "with":
        with loader:
            pass
    elif how == "error":
        with pytest.raises(KeyError), loader:
            raise KeyError
    del loader
    gc.collect()
    deadline = time.monotonic() + 60
    while set(loader_threads()) - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not set(loader_threads()) - before


def test_no_more_batches_are_prepared_than_asked_for(
    image_folder: ImageFolder, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    plain = IJEPA.prepare

    def count(self: IJEPA, views: Sequence[Tensor], sample_indices: Tensor, moment: Moment) -> MaskedImages:
        steps.append(moment.step)
        return plain(self, views, sample_indices, moment)

    monkeypatch.setattr(IJEPA, "prepare", count)
    loader = make_loader(dataset_of(image_folder(12)), make_config(loader="turbo", prefetch=3), stop=100)
    with loader:
        for _ in range(4):
            next(loader)
        deadline = time.monotonic() + 60
        while len(steps) < 7 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        assert sorted(steps) == list(range(7))  # 4 delivered, 3 ahead


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_memory_does_not_grow_with_the_steps(
    image_folder: ImageFolder, make_config: MakeConfig, loader_name: str
) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    config = make_config(loader=loader_name, image_size=64, in_channels=3, mean=(0.5,) * 3, std=(0.25,) * 3)
    with make_loader(dataset_of(image_folder(24)), config, stop=500) as loader:
        for _ in range(100):
            batch = next(loader)
        before = resident()
        for _ in range(400):
            batch = next(loader)
        grown = resident() - before
    # A leak of the images alone would be 400 x 12 x 3 x 64 x 64 bytes = 59 MB.
    assert prepared(batch).images.nbytes * 400 > 58e6
    assert grown < 20e6


# With a GPU


@pytest.mark.gpu
def test_batches_on_the_gpu_are_those_of_the_cpu(
    image_folder: ImageFolder, make_config: MakeConfig, loader_name: str
) -> None:
    folder, config = image_folder(13), make_config(loader=loader_name)
    expected = load(folder, config, stop=4)
    with make_loader(dataset_of(folder), config, stop=4, device=torch.device("cuda", 0)) as loader:
        for batch, reference in zip(loader, expected, strict=True):
            ours, theirs = prepared(batch), prepared(reference)
            assert all(tensor.is_cuda for tensor in ours.tensors())
            np.testing.assert_array_equal(batch.sample_ids, reference.sample_ids)
            assert torch.equal(ours.masks.context_indices.cpu(), theirs.masks.context_indices)
            assert (ours.images.cpu().float() - theirs.images.float()).abs().mean() < 4


@pytest.mark.gpu
def test_a_batch_on_the_gpu_is_not_overwritten_while_a_slow_step_uses_it(
    image_folder: ImageFolder, make_config: MakeConfig, loader_name: str
) -> None:
    """The step's work is queued behind a long wait, and the batch is let go at once, as in the trainer."""
    folder, config = image_folder(13), make_config(loader=loader_name, prefetch=2)
    expected = [prepared(batch).images.float().mean() for batch in load(folder, config, stop=20)]
    means = []
    with make_loader(dataset_of(folder), config, stop=20, device=torch.device("cuda", 0)) as loader:
        for batch in loader:
            torch.cuda._sleep(50_000_000)
            means.append(prepared(batch).images.float().mean())
            del batch
        torch.cuda.synchronize()
    for ours, reference in zip(means, expected, strict=True):
        assert abs(ours.item() - reference.item()) < 1
