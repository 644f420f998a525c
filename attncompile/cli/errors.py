"""What goes wrong: the exit code for an error, and one sentence about it."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

# Click's base of all errors about arguments. Some releases of typer bring a copy of click instead of
# importing it, so it is taken from where both have it.
Misuse = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")

DONE, FAILED, MISUSED, NOTHING_FOUND, DEFECT, INTERRUPTED = 0, 1, 2, 3, 70, 130


def _out_of_memory(error: BaseException) -> bool:
    """Python's, PyTorch's (CPU and GPU) and ONNX Runtime's ways of saying that memory ran out."""
    said = str(error).lower()
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or any(part in said for part in ("can't allocate memory", "failed to allocate memory", "bad_alloc"))
    )


def _interrupted(error: BaseException) -> bool:
    return isinstance(error, KeyboardInterrupt | typer.Abort)


def _misused(error: BaseException) -> bool:
    return isinstance(error, Misuse)


def _without_attention(error: BaseException) -> bool:
    return type(error).__name__ == "NoSiteError"


def _from_the_system(error: BaseException) -> bool:
    return isinstance(error, OSError)


def _ours(error: BaseException) -> bool:
    """Whether a ValueError was raised by this package, for the user to read, not somewhere underneath."""
    if not isinstance(error, ValueError):
        return False
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and Path(frames[-1].filename).is_relative_to(Path(__file__).parents[1])


# What is foreseen: how to recognise it, the exit code, and what to say.
_FORESEEN: tuple[tuple[Callable[[Any], bool], int, Callable[[Any], str]], ...] = (
    (_interrupted, INTERRUPTED, lambda error: "interrupted; nothing half-written was left behind"),
    (
        _out_of_memory,
        MISUSED,
        lambda error: "out of memory; use a smaller model or a machine with more memory, nothing was written",
    ),
    (_without_attention, NOTHING_FOUND, str),
    (_misused, MISUSED, lambda error: error.format_message().replace("Value error, ", "")),
    (
        _from_the_system,
        MISUSED,
        lambda error: f"{error.strerror or error}" + (f": {error.filename}" if error.filename else ""),
    ),
    (_ours, MISUSED, str),
)


def explain(error: BaseException) -> tuple[int, str]:
    """The exit code for an error and one sentence about it."""
    for recognised, code, said in _FORESEEN:
        if recognised(error):
            return code, _first_line(said(error))
    return DEFECT, (
        f"unexpected {type(error).__name__}: {_first_line(str(error))}; this is a defect of attncompile: "
        "please report it with what --debug prints"
    )


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "no more is known")


__all__ = [
    "DEFECT",
    "DONE",
    "FAILED",
    "INTERRUPTED",
    "MISUSED",
    "NOTHING_FOUND",
    "Misuse",
    "explain",
]
