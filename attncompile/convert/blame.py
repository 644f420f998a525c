"""Whose fault it is that a model that was read cannot be worked on: the file's, or our own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from attncompile.convert.clean import Before
from attncompile.frontends.errors import CaptureError, InputError

OURS = (
    "onnx.checker, shape inference and ONNX Runtime take {} as it is, so this is a defect of attncompile: please "
    "report it, with the model if you may"
)
"""A note at an error of our own."""


@contextmanager
def blaming(file: Path, before: Before) -> Iterator[None]:
    """Around work on a model. Errors for a person, and a lack of memory, are passed on; any other is the file's where
    others refuse it too. Where nobody does it is ours: it stays what it is, with a note that says so.

    Args:
        file: what the user gave; before: the same as it is worked on.

    Raises:
        InputError: where the file is at fault, with what others say of it.
    """
    try:
        yield
    except (InputError, CaptureError, MemoryError):
        raise
    except Exception as error:
        refused = next((one for one in before.complaints if one.refused), None)
        if refused is None:
            error.add_note(OURS.format(file.name))
            raise
        said = (str(error).strip().splitlines() or [""])[0][:200]
        raise InputError(
            f"the model contradicts itself ({refused}), and cannot be rewritten ({type(error).__name__}: {said})",
            file,
            "export it again without that; report this if it then goes on",
        ) from error


__all__ = ["OURS", "blaming"]
