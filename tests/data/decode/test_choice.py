"""Choice of a decoder: which one, and what the log says about it."""

import logging
import sys
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from fastjepa.config import Config
from fastjepa.data.decode import choice
from fastjepa.data.decode.choice import choose_decoder
from fastjepa.data.decode.cpu import CPUDecoder
from fastjepa.data.decode.dali import dali_problem
from tests.support.decoding import CPU, decoder_for


def test_a_channel_count_that_no_file_has_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.in_channels = 4: expected 3 \(RGB\) or 1 \(grey\)"):
        decoder_for("turbo", (8, 8), 4)


def test_auto_on_a_cpu_is_the_decoder_on_the_cpu_and_is_logged_once(
    make_config: Callable[..., Config], caplog: pytest.LogCaptureFixture
) -> None:
    choice._use_dali.cache_clear()
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            assert isinstance(choose_decoder(make_config().data, CPU, 4, ThreadPoolExecutor(1)), CPUDecoder)
    (message,) = [message for message in caplog.messages if "decoded by" in message]
    assert message == "images are decoded by libjpeg-turbo and Pillow (data.loader = auto on a cpu device)"


def test_auto_without_dali_is_the_decoder_on_the_cpu_on_a_gpu_too_and_the_reason_is_logged_once(
    make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # On systems without a build, the package index holds an empty 0.0.0, which can be imported.
    placeholder = types.ModuleType("nvidia.dali")
    placeholder.__version__ = "0.0.0"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nvidia", types.ModuleType("nvidia"))
    monkeypatch.setitem(sys.modules, "nvidia.dali", placeholder)
    assert "placeholder" in str(dali_problem())
    choice._use_dali.cache_clear()
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            assert not choice._use_dali("auto", "cuda")
    (message,) = [message for message in caplog.messages if "decoded by" in message]
    assert "Pillow" in message
    assert "placeholder" in message
    with pytest.raises(ValueError, match=r"data\.loader = dali: .*placeholder.*fastjepa\[dali\].*turbo"):
        choose_decoder(make_config(loader="dali").data, CPU, 4, ThreadPoolExecutor(1))
    choice._use_dali.cache_clear()
