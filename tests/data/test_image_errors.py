"""Errors about single images: their messages."""

import errno
import os

import pytest

from fastjepa.data.image_errors import BadImages, reason_of


def test_bad_images_name_every_position_with_its_reason() -> None:
    error = BadImages({2: "empty file", 5: "truncated"})
    assert error.bad == {2: "empty file", 5: "truncated"}
    assert str(error) == "image 2 of the batch: empty file; image 5 of the batch: truncated"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "/secret/path.jpg"), "No such file or directory"),
        (OSError("image file is truncated"), "image file is truncated"),
        (ValueError("wrong magic"), "wrong magic"),
        (IndexError(), "IndexError"),
    ],
)
def test_a_reason_is_short_never_empty_and_without_a_path(error: Exception, reason: str) -> None:
    assert reason_of(error) == reason
