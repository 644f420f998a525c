"""The folder that a conversion writes: all of it or nothing.

Everything goes into a hidden folder beside OUT, which takes OUT's place in one rename at the end. An error,
Ctrl-C or a termination signal on the way removes the hidden folder and leaves what was there before.
"""

from __future__ import annotations

import errno
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attncompile.frontends.errors import InputError, given_path

if TYPE_CHECKING:
    from attncompile.report import Report

Progress = Callable[[str], None]
"""Told the name of each stage as it begins, such as ``"checking 3 lengths"``."""

MARKS = ("plan.json", "report.json", "certificate.json", "kernels.json")
"""A folder that holds one of these was written here, so it may be replaced."""


def silent(stage: str) -> None:
    """The `Progress` that shows nothing."""


class NoSiteError(InputError):
    """A model without any attention site: there is nothing to convert."""

    def __init__(self, where: object) -> None:
        super().__init__(
            "NO ATTENTION SITE FOUND, so there is nothing to convert",
            where,
            "attncompile inspect says what was searched",
        )


@dataclass(frozen=True)
class Conversion:
    """What a conversion made.

    Attributes:
        folder: where it is; None while it is still being written.
        target: ``onnx``, ``torch`` or ``pt2``.
        report: what was done at each site, and why.
        certificate: the measured evidence that it computes what the original does.
    """

    folder: Path | None
    target: str
    report: Report
    certificate: Any

    def __str__(self) -> str:
        return f"{self.target} artefact in {self.folder}\n{self.report}"


@contextmanager
def new_folder(out: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A hidden folder to write to, which becomes ``out`` when the block ends without an exception.

    Enter it before any long work: what is wrong with ``out`` is then said at once.

    Args:
        out: the folder to make. Folders above it are made too, and removed again on failure.
        overwrite: replace an existing folder, but only one that a conversion wrote, or an empty one.

    Raises:
        InputError: when ``out`` exists and may not be replaced, or cannot be written; also for a full disk
            inside the block.
    """
    out = given_path(out)
    _check_replaceable(out, overwrite)
    made = _make_parents(out.parent)
    scratch: Path | None = None
    try:
        try:
            scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
            yield scratch
            _make_readable(scratch)
            _take_place(scratch, out)
        except OSError as error:
            raise _explained(error, out) from error
    except BaseException:
        # also KeyboardInterrupt and SystemExit: nothing half-written stays
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
        for folder in reversed(made):
            _remove_empty(folder)
        raise


def _check_replaceable(out: Path, overwrite: bool) -> None:
    if not out.exists() and not out.is_symlink():
        return
    if not overwrite:
        raise InputError("it exists already", out, "choose another OUT, or pass --overwrite to replace it")
    if out.is_symlink() or not out.is_dir():
        raise InputError("only a folder can be replaced, and this is none", out, "choose another OUT")
    try:
        entries = {entry.name for entry in out.iterdir()}
    except OSError as error:
        raise _explained(error, out) from error
    if entries and not entries & set(MARKS):
        raise InputError(
            "this folder was not written by a conversion, so it is not replaced",
            out,
            "choose another OUT, or remove it yourself",
        )


def _make_parents(folder: Path) -> list[Path]:
    """Make a folder and those above it; returns the ones that were missing, topmost first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _explained(error, folder) from error
    return list(reversed(missing))


def _take_place(scratch: Path, out: Path) -> None:
    """Rename ``scratch`` to ``out``; what was there is put aside first and comes back if that fails."""
    if not out.exists():
        scratch.rename(out)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{out.name}-old-", dir=out.parent))
    previous = out.rename(aside / "previous")
    try:
        scratch.rename(out)
    except BaseException:
        previous.rename(out)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _make_readable(folder: Path) -> None:
    """Give everybody the right to read: mkdtemp, safetensors and others write for the owner alone."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


def _remove_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:
        return  # somebody else put something there


_REASONS = {
    errno.EACCES: ("no permission to write", "choose a folder that is yours"),
    errno.EPERM: ("no permission to write", "choose a folder that is yours"),
    errno.EROFS: ("this file system is read-only", "choose another OUT"),
    errno.ENOSPC: ("no space is left on the disk", "free some, or choose an OUT on another disk"),
    errno.EDQUOT: ("the disk quota is used up", "free some space, or choose an OUT on another disk"),
    errno.ENOTDIR: ("a part of this path is a file, not a folder", "choose another OUT"),
    errno.EEXIST: ("a part of this path is a file, not a folder", "choose another OUT"),
    errno.ENAMETOOLONG: ("this name is too long", "choose a shorter OUT"),
}


def _explained(error: OSError, out: Path) -> OSError | InputError:
    """The same failure as one sentence where it concerns writing; any other error as it is."""
    known = _REASONS.get(error.errno or 0)
    return InputError(known[0], out, known[1]) if known else error
