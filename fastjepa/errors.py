"""Errors that a user can put right.

The command line prints their message without a traceback and exits with their status.
"""

from __future__ import annotations


class FastjepaError(Exception):
    """Base class of the errors that are meant for users."""

    exit_status = 2


def describe_error(error: BaseException) -> str:
    """Return the message of an error, preceded by its type unless the message is written for users."""
    return str(error) if isinstance(error, FastjepaError | OSError) else f"{type(error).__name__}: {error}"


class ConfigError(FastjepaError, ValueError):
    """A setting cannot work; the message names it, its value and what was expected."""


class DataError(FastjepaError, ValueError):
    """The images cannot be used."""


class CheckpointError(FastjepaError, RuntimeError):
    """A checkpoint cannot be written, read, or used for this run."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint is incomplete or was altered after it was written; an earlier one may still load."""


class RunFolderError(FastjepaError, RuntimeError):
    """The run folder cannot be used."""


class TrainingError(FastjepaError, RuntimeError):
    """Training cannot go on."""


class Preempted(FastjepaError, RuntimeError):
    """The run was asked to stop. Its state is saved, and the same command continues it."""

    exit_status = 75  # EX_TEMPFAIL: tells a scheduler to queue the job again
