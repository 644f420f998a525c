"""The forms of a model that a conversion to ONNX compares, run one after the other: one is in memory at a time."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from attncompile.codegen.onnx.tried import installed, newest_opset
from attncompile.convert.artifact import Progress, silent
from attncompile.convert.calibration import Call
from attncompile.convert.comparison import Inputs, Run, Runs
from attncompile.convert.memory import read_by_modules, release
from attncompile.convert.onnx_older import is_too_new, spell_out_unknown, why_too_new
from attncompile.convert.recorded import recorded
from attncompile.convert.runtime import LoadError, run, save, session
from attncompile.convert.widened import Widened, outputs_of
from attncompile.frontends.checkpoint import OpenedModel
from attncompile.frontends.errors import InputError
from attncompile.frontends.onnx_file import load_onnx


def known_runs(
    opened: OpenedModel,
    before: Path,
    provider: str,
    inputs: Inputs,
    scratch: Path,
    progress: Progress = silent,
    *,
    doing: str = "",
    exactly: bool = True,
) -> Runs:
    """What a result is compared with: the original, in float64 too, and the export, all of it in files.

    The place of the result is still the export's.

    Args:
        opened: the original; before: its export; provider: where that runs.
        inputs: what to run them on, in float64 the calls alone.
        scratch: a folder to make for the files; progress: told each call; doing: of what, behind a space.
        exactly: whether float64 is wanted.
    """
    scratch.mkdir()
    release()
    before = runnable(before, scratch, opened.path)
    try:
        told = running(progress, f"the export{doing}")
        plain = session_results(before, provider, inputs.every, scratch / "plain", told)
    except LoadError as error:
        if opened.kind != "onnx":
            raise
        raise _not_loaded(error, opened.path, before) from error
    if opened.kind == "onnx":
        return Runs(plain, plain, plain)
    told, wide = running(progress, f"the original{doing}"), running(progress, f"the original{doing} in float64")
    exact: Run | None = None
    with torch.no_grad():
        with read_by_modules(opened.model):
            original = recorded(
                lambda call: outputs_of(opened.model(*call.args, **call.kwargs)),
                inputs.every,
                scratch / "original",
                told,
            )
        if exactly:
            exact = recorded(Widened(opened.model), inputs.calls, scratch / "exact", wide)
    release()
    return Runs(original, plain, plain, exact, "ONNX Runtime")


def _not_loaded(error: LoadError, given: Path, before: Path) -> InputError:
    """The error for a given file that ONNX Runtime does not take, which names that file and not a copy of it."""
    unknown = "is not a registered function/op" in error.what
    own = "a result is compared with it in ONNX Runtime, which has to know its operators; write that one in known ones"
    return InputError(error.what.replace(before.name, given.name), given, own if unknown else error.advice)


def runnable(file: Path, folder: Path, given: Path) -> Path:
    """A model that the installed ONNX Runtime takes: the file, or where it is too new the same model in a folder, with
    the standard's definitions in the place of calls that are not known yet.

    Args:
        file: the model; folder: where to write another form; given: what the user calls it.

    Raises:
        InputError: when some call has no definition in terms of what is known, so that nothing here runs it.
    """
    model = load_onnx(file)
    if not is_too_new(model):
        return file
    if not spell_out_unknown(model):
        newest, why = newest_opset(), why_too_new(model)
        raise InputError(
            f"ONNX Runtime {installed()} runs opset {newest} at most, and not all can be said in it: {why}",
            given,
            f"export it with opset {newest}, do without that operator, or install a newer ONNX Runtime",
        )
    older = folder / f"older_{file.name}"
    save(model, older, largest=0)
    return older


def session_results(
    file: Path, provider: str, calls: Sequence[Call], scratch: Path, progress: Progress = silent
) -> Run:
    """What a model in ONNX Runtime gives, in files; the session has ended by then.

    Args:
        file: the model; provider: where it runs; calls: what on.
        scratch: a folder to make for the files; progress: told each call.
    """
    found = recorded(partial(run, session(file, provider, lean=True)), calls, scratch, progress)
    release()
    return found


def running(progress: Progress, what: str) -> Progress:
    """Tells the calls of one form of a model."""
    return lambda call: progress(f"running {what}: {call}")


__all__ = ["known_runs", "runnable", "running", "session_results"]
