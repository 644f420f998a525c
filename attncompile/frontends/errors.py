"""Errors that a person reads: bad input and models that cannot be captured. Each message is one plain
sentence."""

from __future__ import annotations

import os
import re
from pathlib import Path


class InputError(ValueError):
    """Something the user gave (a path, a file, a function) cannot be used.

    The message is one sentence: what is wrong, where, and what to do about it.
    """

    def __init__(self, what: str, where: object, advice: str) -> None:
        self.what = what
        self.where = str(where)
        self.advice = advice
        super().__init__(f"{what}: {where}; {advice}")


def given_path(path: str | os.PathLike[str]) -> Path:
    """The path that somebody gave, with the home folder for ``~``.

    Raises:
        InputError: for an empty text, such as a variable of a shell that is not set: Python takes it for the working
            folder.
    """
    if not os.fspath(path):
        raise InputError("an empty path", repr(path), "name a file or a folder")
    return Path(path).expanduser()


def first_cause(error: BaseException) -> BaseException:
    """What was wrong, not what was being done: the error that the others were raised for."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def first_line(error: BaseException) -> str:
    """The first line of an error that says something, without a terminal's colours; its type where it says nothing."""
    lines = (" ".join(line.split()).rstrip(".") for line in _COLOURS.sub("", str(error)).splitlines())
    return next(filter(None, lines), type(error).__name__)


_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def unreadable(path: object) -> InputError:
    """The error for a file or folder that may not be read."""
    return InputError("no permission to read", path, "change its permissions or copy it elsewhere")


class CaptureError(ValueError):
    """A model runs, but no graph of it could be taken.

    ``route`` is "export" or "dynamo"; ``reason`` is torch's own explanation, shortened to its first line.
    """

    def __init__(self, route: str, subject: str, reason: str, advice: str) -> None:
        self.route = route
        self.subject = subject
        self.reason = reason
        self.advice = advice
        super().__init__(f"no graph of {subject} could be taken by {route}: {reason}; {advice}")
