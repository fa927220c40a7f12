"""DALI gives the pixels of the decoder on the CPU, and its failures are told apart."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastjepa.config import DataConfig
from fastjepa.data.decode.choice import choose_decoder
from fastjepa.data.order import central_boxes
from tests.support.decoding import decode, decoder_for, encoded, random_boxes
from tests.support.image_files import Pixels, write_formats


@pytest.mark.parametrize("suffix", ["png", "jpg"])
@pytest.mark.parametrize(("in_channels", "mean_bound"), [(3, 0.3), (1, 0.7)])
def test_dali_agrees_with_the_decoder_on_the_cpu(
    photos: dict[str, Path], suffix: str, in_channels: int, mean_bound: float
) -> None:
    """The mean difference over random crops stays below 0.3 levels of 255 in colour, and below 0.7 in grey.

    Two pixels or more inside the border, rounding makes at most two levels. At the border DALI repeats the outermost pixel
    and Pillow shortens the filter. The grey of a PNG file differs because the weights of its colours are rounded.
    """
    pytest.importorskip("nvidia.dali", reason="needs DALI")
    boxes = random_boxes(427, 640, 16)
    boxes[0] = central_boxes(DataConfig(), np.array([[427, 640]], np.int32))[0]
    turbo, dali = (
        decode(decoder_for(name, (224, 224), in_channels), [photos[suffix]] * 16, boxes).float()
        for name in ("turbo", "dali")
    )
    difference = (dali - turbo).abs()
    assert difference.mean() < mean_bound
    assert difference.max() < 20
    assert difference[:, :, 2:-2, 2:-2].max() <= 2


def test_dali_failing_on_a_good_batch_is_replaced_and_dali_failing_always_is_an_error(
    photos: dict[str, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    dali = pytest.importorskip("nvidia.dali", reason="needs DALI")
    run = dali.Pipeline.run
    fails: Callable[[int], bool] = lambda count: count > 1  # noqa: E731

    def fail(self: object, **inputs: list[object]) -> object:
        if fails(len(inputs["file"])):
            raise RuntimeError("out of memory")
        return run(self, **inputs)

    monkeypatch.setattr(dali.Pipeline, "run", fail)
    decoder, boxes = decoder_for("dali", (32, 32)), random_boxes(427, 640, 2)
    for _ in range(2):
        images = decode(decoder, [photos["jpg"]] * 2, boxes)
    assert torch.equal(images, decode(decoder_for("turbo", (32, 32)), [photos["jpg"]] * 2, boxes))
    (message,) = [message for message in caplog.messages if "out of memory" in message]
    assert "decoded on the CPU" in message
    fails = lambda count: True  # noqa: E731
    with pytest.raises(RuntimeError, match="out of memory"):
        decode(decoder, [photos["jpg"]] * 2, boxes)


@pytest.mark.gpu
@pytest.mark.parametrize("hw_decoder_load", [0.0, 0.65, 1.0])
def test_decoding_on_the_gpu_gives_the_pixels_of_the_cpu(
    tmp_path: Path, photograph: Pixels, hw_decoder_load: float
) -> None:
    """Decode every kind of file and a full batch of JPEG files ten times: the hardware decoder is reported to race."""
    formats = write_formats(tmp_path, photograph)
    Image.fromarray(photograph).save(tmp_path / "photo.jpg")
    paths = [path for path, _ in formats.values()] + [tmp_path / "photo.jpg"] * 64
    images = [encoded(path) for path in paths]
    boxes = np.array([(0, 0, image.height, image.width) for image in images], np.int32)
    flips = np.zeros(len(images), bool)
    config = DataConfig(image_size=(64, 96), loader="dali", hw_decoder_load=hw_decoder_load)
    on_gpu = choose_decoder(config, torch.device("cuda", 0), len(images), ThreadPoolExecutor(4))
    expected = decoder_for("turbo", (64, 96), max_batch=len(images)).decode(images, boxes, flips).float()
    for _ in range(10):
        difference = (on_gpu.decode(images, boxes, flips).cpu().float() - expected).abs()
        assert difference.mean((1, 2, 3)).max() < 1.5
