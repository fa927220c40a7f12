"""What a user can put right.

The command line prints the message of these, without a traceback, and exits with their status.
"""

from __future__ import annotations


class FastjepaError(Exception):
    """Base of the errors that are meant for users."""

    exit_status = 2


def describe_error(error: BaseException) -> str:
    """What went wrong, for a message: of errors that do not say it by themselves, the type too."""
    return str(error) if isinstance(error, FastjepaError | OSError) else f"{type(error).__name__}: {error}"


class ConfigError(FastjepaError, ValueError):
    """A setting cannot work; the message names it, its value and what was expected."""


class DataError(FastjepaError, ValueError):
    """The images cannot be used."""


class CheckpointError(FastjepaError, RuntimeError):
    """A checkpoint cannot be written, read, or used for this run."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint is incomplete or not as it was written: an earlier one may do."""


class RunFolderError(FastjepaError, RuntimeError):
    """The run folder cannot be used."""


class TrainingError(FastjepaError, RuntimeError):
    """Training cannot go on."""


class Preempted(FastjepaError, RuntimeError):
    """The run was asked to stop; what it had done is saved: started again it goes on."""

    exit_status = 75  # EX_TEMPFAIL: to be queued again
