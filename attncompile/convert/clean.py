"""What others have to say against an ONNX file: onnx.checker, strict shape inference, ONNX Runtime's strict loading.

``onnx`` knows the operators of the standard and no contributed ones: it says nothing against these, and takes what they
give as unknown. ONNX Runtime has the schemas of both; in its strict mode what it infers of shapes and types must not
contradict what the file says. Nothing is registered with either. Files are read by their paths: ``onnx`` does not look
into weights beside them, so there is no limit of two gigabytes.

Of a result counts what was not wrong before (:mod:`attncompile.convert.faults`). ONNX Runtime tells one fault and
stops, so that of several in a given file it may name another one once the first is gone: that one is held against the
result unless onnx told it before.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import onnx
import onnxruntime

from attncompile.convert.faults import Fault, faults
from attncompile.convert.providers import session_providers

LOGGED_AS = "attncompile.clean"
"""What ONNX Runtime calls our session in its log."""

_OURS = re.compile(rf"\[(?P<level>[WEF]):onnxruntime:{re.escape(LOGGED_AS)}, (?P<place>[^\]]*)\] ?(?P<said>.*)")

_ON_THE_CPU = "VerifyEachNodeIsAssignedToAnEp"
"""The place of a warning that a GPU leaves nodes to the CPU: sizes are computed there on purpose."""


_CHECKER, _INFERENCE, _STRICTLY = "onnx.checker", "shape inference", "ONNX Runtime, loading strictly"
"""Who complains."""

_ONNX = frozenset({_CHECKER, _INFERENCE})
"""Those of onnx, which share its inference."""


@dataclass(frozen=True)
class Complaint:
    """What one tool says against a file.

    Attributes:
        tool: which.
        said: its words, in one line.
        refused: whether the file is wrong by it, rather than something to warn of.
        faults: all that it finds wrong.
    """

    tool: str
    said: str
    refused: bool = True
    faults: tuple[Fault, ...] = ()

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


@dataclass(frozen=True)
class Before:
    """What a result is made from.

    Attributes:
        file: the model; provider: where it runs.
    """

    file: Path
    provider: str

    @cached_property
    def complaints(self) -> tuple[Complaint, ...]:
        """What there was to say against it; asked once, when something is to be said against a result."""
        return complaints(self.file, self.provider)

    @cached_property
    def nodes(self) -> frozenset[str]:
        """Names of its nodes."""
        return _node_names(self.file)

    def faults(self, tools: frozenset[str]) -> tuple[Fault, ...]:
        """What some tools found wrong."""
        return tuple(fault for one in self.complaints if one.tool in tools for fault in one.faults)


def judged(file: Path, before: Before) -> Judged:
    """The complaints of a result, beside those of what it was made from.

    Args:
        file: the result; before: what it was made from, looked at where there is a complaint.
    """
    found = complaints(file, before.provider)
    fresh = {one: _fresh(one, file, before) for one in found if one.refused}
    problem = next((_worded(one, new) for one, new in fresh.items() if new), None)
    said = (f"{one}{' (so it was before)' if one in fresh and not fresh[one] else ''}" for one in found)
    return Judged(problem, tuple(f"{file.name} is not clean: {one}" for one in said))


def _fresh(complaint: Complaint, file: Path, before: Before) -> tuple[Fault, ...]:
    """The faults of a refused result that were not there before."""
    if not any(one.refused for one in before.complaints):
        return complaint.faults
    by_onnx, by_runtime = before.faults(_ONNX), before.faults(frozenset({_STRICTLY}))
    if complaint.tool in _ONNX:
        # operators of ONNX Runtime's own may have kept from onnx's inference what was wrong behind them; that counts
        # wherever it shows now
        own, others = by_onnx, {fault.kind for fault in by_runtime} - {fault.kind for fault in by_onnx}
    else:
        own, others = by_runtime, {fault.kind for fault in by_onnx}  # of which it told the first alone
    nodes = _node_names(file)
    return tuple(
        fault for fault in complaint.faults if fault.kind not in others and not fault.is_known(own, before.nodes, nodes)
    )


def _worded(complaint: Complaint, fresh: tuple[Fault, ...]) -> str:
    """The complaint, or of one that is partly known the first that is new."""
    return str(complaint if len(fresh) == len(complaint.faults) else replace(complaint, said=fresh[0].said))


def _node_names(file: Path) -> frozenset[str]:
    """Names of all nodes of a file, in bodies too; none of one that cannot be read, or for nodes without a name."""
    try:
        graph = onnx.load(file, load_external_data=False).graph
    except Exception:  # of what reads the file, which its complaints tell
        return frozenset()
    found, graphs = set[str](), [graph]
    while graphs:
        for node in graphs.pop().node:
            found.add(node.name)
            for attribute in node.attribute:
                graphs += [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]
    return frozenset(found - {""})


def _checker(file: Path) -> Iterator[Complaint]:
    try:
        onnx.checker.check_model(str(file), full_check=True)  # in strict mode, by path and in place
    except Exception as error:  # of the checker, of inference, and of what reads the file
        yield _refused(_CHECKER, error, file)


def _inference(file: Path) -> Iterator[Complaint]:
    with tempfile.TemporaryDirectory(prefix="attncompile-") as folder:
        try:
            onnx.shape_inference.infer_shapes_path(
                str(file), str(Path(folder) / file.name), check_type=True, strict_mode=True, data_prop=True
            )
        except Exception as error:
            yield _refused(_INFERENCE, error, file)


def _loading(file: Path, providers: tuple[str, ...]) -> Iterator[Complaint]:
    options = onnxruntime.SessionOptions()
    options.logid, options.log_severity_level = LOGGED_AS, 2
    options.add_session_config_entry("session.strict_shape_type_inference", "1")
    options.add_session_config_entry("session.disable_prepacking", "1")  # a copy of the weights that nothing here reads
    with _logged() as lines:
        failed: Exception | None = None
        try:
            onnxruntime.InferenceSession(str(file), options, providers=list(providers))
        except Exception as error:  # ONNX Runtime's own share no other base
            failed = error
    if failed is not None:
        yield _refused(_STRICTLY, failed, file)
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


def _refused(tool: str, error: Exception, file: Path) -> Complaint:
    said = [line.strip() for line in _plain(str(error), file).splitlines() if line.strip()] or [type(error).__name__]
    return Complaint(tool, " ".join(said[:3]), faults=faults("\n".join(said)))


def _plain(said: str, file: Path) -> str:
    """Without the folder, which is another one when the conversion has ended."""
    return said.replace(str(file), file.name)


__all__ = ["Before", "Complaint", "Judged", "complaints", "judged"]
