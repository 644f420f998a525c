"""What others have to say against an ONNX file: onnx.checker, strict shape inference, ONNX Runtime's strict loading.

``onnx`` knows the operators of the standard and no contributed ones: it says nothing against these, and takes what they
give as unknown. ONNX Runtime has the schemas of both; in its strict mode what it infers of shapes and types must not
contradict what the file says. Nothing is registered with either. Files are read by their paths: ``onnx`` does not look
into weights beside them, so there is no limit of two gigabytes.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnxruntime

from attncompile.convert.providers import session_providers

LOGGED_AS = "attncompile.clean"
"""What ONNX Runtime calls our session in its log."""

_OURS = re.compile(rf"\[(?P<level>[WEF]):onnxruntime:{re.escape(LOGGED_AS)}, (?P<place>[^\]]*)\] ?(?P<said>.*)")

_ON_THE_CPU = "VerifyEachNodeIsAssignedToAnEp"
"""The place of a warning that a GPU leaves nodes to the CPU: sizes are computed there on purpose."""


_CHECKER, _INFERENCE, _STRICTLY = "onnx.checker", "shape inference", "ONNX Runtime, loading strictly"
"""Who complains."""


@dataclass(frozen=True)
class Complaint:
    """What one tool says against a file.

    Attributes:
        tool: which.
        said: its words, in one line.
        refused: whether the file is wrong by it, rather than something to warn of.
    """

    tool: str
    said: str
    refused: bool = True

    def __str__(self) -> str:
        return f"{self.tool}: {self.said}"


def complaints(file: Path, provider: str) -> tuple[Complaint, ...]:
    """What there is to say against a file; nothing against one that is clean.

    Args:
        file: the model, of any size; provider: where it is to run.

    Raises:
        InputError: when the provider is not known or not installed.
    """
    return (*_checker(file), *_inference(file), *_loading(file, session_providers(provider)))


@dataclass(frozen=True)
class Judged:
    """What is held against a result.

    Attributes:
        problem: what is wrong with it and was not before, in words; ``None`` where nothing is.
        notes: warnings, and what was wrong before.
    """

    problem: str | None
    notes: tuple[str, ...]


def judged(file: Path, before: Path, provider: str) -> Judged:
    """The complaints of a result, beside those of what it was made from.

    Args:
        file: the result; before: what it was made from, looked at where there is a complaint; provider: where it runs.
    """
    found = complaints(file, provider)
    refusing = {one.tool for one in complaints(before, provider) if one.refused} if found else set[str]()
    if _STRICTLY in refusing:
        # operators of ONNX Runtime's own may have kept from onnx's inference what that knew to be wrong before
        refusing |= {_CHECKER, _INFERENCE}
    problem = next((str(one) for one in found if one.refused and one.tool not in refusing), None)
    said = (f"{one}{' (so it was before)' if one.tool in refusing else ''}" for one in found)
    return Judged(problem, tuple(f"{file.name} is not clean: {one}" for one in said))


def _checker(file: Path) -> Iterator[Complaint]:
    try:
        onnx.checker.check_model(str(file), full_check=True)  # in strict mode, by path and in place
    except Exception as error:  # of the checker, of inference, and of what reads the file
        yield Complaint(_CHECKER, _line(error, file))


def _inference(file: Path) -> Iterator[Complaint]:
    with tempfile.TemporaryDirectory(prefix="attncompile-") as folder:
        try:
            onnx.shape_inference.infer_shapes_path(
                str(file), str(Path(folder) / file.name), check_type=True, strict_mode=True, data_prop=True
            )
        except Exception as error:
            yield Complaint(_INFERENCE, _line(error, file))


def _loading(file: Path, providers: tuple[str, ...]) -> Iterator[Complaint]:
    options = onnxruntime.SessionOptions()
    options.logid, options.log_severity_level = LOGGED_AS, 2
    options.add_session_config_entry("session.strict_shape_type_inference", "1")
    with _logged() as lines:
        failed: Exception | None = None
        try:
            onnxruntime.InferenceSession(str(file), options, providers=list(providers))
        except Exception as error:  # ONNX Runtime's own share no other base
            failed = error
    if failed is not None:
        yield Complaint(_STRICTLY, _line(failed, file))
        return
    for said in dict.fromkeys(_plain(line, file) for line in lines):
        yield Complaint("ONNX Runtime", said, refused=False)


_ONE_AT_A_TIME = threading.Lock()


@contextlib.contextmanager
def _logged() -> Iterator[list[str]]:
    """What ONNX Runtime logs of our session in the block; there when it has ended.

    Its log goes to the standard error of the process, and nothing in Python can be told of it. Whatever else was
    written there goes on its way.
    """
    found: list[str] = []
    with _ONE_AT_A_TIME, tempfile.TemporaryFile() as kept:
        if sys.stderr is not None:
            sys.stderr.flush()
        try:
            before = os.dup(2)
        except OSError:  # a process that was started without one: nobody would have read it
            yield found
            return
        try:
            os.dup2(kept.fileno(), 2)
            yield found
        finally:
            os.dup2(before, 2)
            os.close(before)
            kept.seek(0)
            for line in kept.read().decode(errors="replace").splitlines():
                ours = _OURS.search(_COLOUR.sub("", line))
                if ours is None:
                    print(line, file=sys.stderr)
                elif _ON_THE_CPU not in ours["place"]:
                    found.append(ours["said"])


_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def _line(error: Exception, file: Path) -> str:
    said = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return _plain(" ".join(said[:3]), file)


def _plain(said: str, file: Path) -> str:
    """Without the folder, which is another one when the conversion has ended."""
    return said.replace(str(file), file.name)


__all__ = ["Complaint", "Judged", "complaints", "judged"]
