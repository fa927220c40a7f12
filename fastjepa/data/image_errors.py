"""Errors about single images: what is raised when one cannot be used, and how its reason is put into words."""

from __future__ import annotations

from collections.abc import Mapping

from fastjepa.errors import DataError


class BadImage(DataError):
    """An image cannot be used; the message is the reason."""


class BadImages(DataError):
    """Some images of a batch cannot be used."""

    def __init__(self, bad: Mapping[int, str]) -> None:
        """
        Args:
            bad: position in the batch -> reason.
        """
        super().__init__("; ".join(f"image {position} of the batch: {reason}" for position, reason in bad.items()))
        self.bad = bad


def reason_of(error: BaseException) -> str:
    """An error in a few words, without a path: the reason that is logged for an image or a file."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
