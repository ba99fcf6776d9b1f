"""Errors that a user sees: one line that names the value and the remedy.

All are `CapszooError`, a ValueError, but for `Stopped`, which is not an error.
"""

import difflib
from collections.abc import Iterable


class CapszooError(ValueError):
    """An error for users; its message is one line that names the value and the remedy."""


class UsageError(CapszooError):
    """A command line or configuration that cannot be run; the message names the value and the remedy."""


class CheckpointError(CapszooError):
    """A checkpoint that cannot be used; the message names the file and the remedy."""


class UnreadableError(CheckpointError):
    """A checkpoint that may be sound, but cannot be read: its permissions, the disk or the memory are at fault."""


class WriteError(CapszooError):
    """A file that cannot be written; the message names it, the reason and the remedy."""


class DataError(CapszooError):
    """A data set that is not there, damaged or not what was asked for. The message is one line with the remedy."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.splitlines()))  # names of files may have line breaks


class TrainingError(CapszooError):
    """Training cannot start or go on; the message says why and what to do."""


class RanksError(CapszooError):
    """Processes that cannot train together; the message says why and what to do."""


class InspectionError(CapszooError):
    """A model that does not have what is to be looked at; the message says what does."""


class Stopped(Exception):
    """A measurement was given up, because the run is asked to stop."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def one_line(error: Exception) -> str:
    """Return an exception's type and message without line breaks, for an error message."""
    return " ".join(f"{type(error).__name__}: {error}".split()).rstrip(": ")


def nearest(name: object, known: Iterable[str]) -> str | None:
    """The known name that is most like another one, if any is."""
    return next(iter(difflib.get_close_matches(str(name), list(known), n=1)), None)


def unknown_name(kind: str, name: str, known: Iterable[str], otherwise: str) -> str:
    """Say that a name is unknown, with the nearest known one, or else what to do."""
    near = nearest(name, known)
    return f"unknown {kind} {name!r}, " + (f"did you mean {near!r}?" if near else otherwise)
