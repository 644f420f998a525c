"""A converted model in another precision, judged by its budget; what hurts most is left in float32 until that holds."""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir

from attncompile.codegen.onnx.quantize import Feed
from attncompile.convert.cached_ranges import cached_ranges
from attncompile.convert.calibration import Call, calls, running_text, text_calls
from attncompile.convert.change import Change, difference, observed
from attncompile.convert.comparison import Runs, measured_quality
from attncompile.convert.continued import behind_caches
from attncompile.convert.memory import release
from attncompile.convert.precision import Precision, prepared, write_precise
from attncompile.convert.quality import Quality
from attncompile.convert.runtime import feeds, save, session
from attncompile.convert.sensitivity import most_hurt
from attncompile.frontends.checkpoint import OpenedModel
from attncompile.frontends.errors import InputError
from attncompile.lift import Program

PIECE, PIECES = 256, 8
"""Tokens of a piece of text, and how many are read: the first half to take ranges from, the second to judge by."""

SHARES = (1 / 32, 2 / 32, 3 / 32, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2)
"""Shares of the projections that are left in float32, the most hurt first, until the budget holds."""

Loaded = Callable[[Path], Runs]
"""The runs to compare for the file of a result."""


@dataclass(frozen=True)
class Texts:
    """What ranges are taken from, and what a result is judged by; both empty for a model that reads no text.

    Pieces of text come first among the latter; behind them, for a model with its cache, the same in more calls
    (:func:`attncompile.convert.continued.behind_caches`).
    """

    calibration: tuple[Call, ...]
    judged: tuple[Call, ...]


def texts_of(opened: OpenedModel, file: Path | None) -> Texts:
    """Pieces of a file, or of documentation that every machine has.

    Raises:
        InputError: when the file cannot be read, is too short, or the model reads no text.
    """
    pieces = text_calls(opened, running_text() if file is None else _read(file), PIECE, PIECES)
    if file is not None and len(pieces) < 2:
        reads = opened.tokenizer is not None and pieces
        what = f"it holds fewer than {PIECE + 2} tokens" if reads else "the model reads no text, so none can be given"
        raise InputError(what, file, "give a longer text" if reads else "leave --text out")
    half = len(pieces) // 2
    return Texts(pieces[:half] or pieces, (*pieces[half:], *behind_caches(opened, pieces[half:])))


def _read(file: Path) -> str:
    try:
        return file.expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"the text cannot be read ({error.strerror})", file, "check the path") from error
    except UnicodeDecodeError as error:
        raise InputError("the text is not UTF-8", file, "convert it") from error


@dataclass(frozen=True)
class Rounded:
    """What became of a model in another precision.

    Attributes:
        kept: projections that were left in float32, by node name.
        notes: what was done, in sentences.
    """

    kept: tuple[str, ...]
    notes: tuple[str, ...]


class OverBudgetError(InputError):
    """A precision changes an output by more than its budget lets.

    Attributes:
        finite: whether the change is a number.
    """

    def __init__(self, what: str, where: object, advice: str, *, finite: bool) -> None:
        super().__init__(what, where, advice)
        self.finite = finite


def round_model(
    opened: OpenedModel,
    source: Path,
    target: Path,
    precision: Precision,
    budget: float,
    texts: Texts,
    loaded: Loaded,
    provider: str,
    version: str | None = None,
) -> Rounded:
    """Write the model of a file in another precision, as much of it as the budget lets.

    Args:
        opened: the original; source: its rewritten float32 model; target: where the result goes.
        precision: what to make; budget: the largest relative change of an output.
        texts: what to take ranges from and to judge by; the latter not empty.
        loaded: makes runs of a result's file; provider: where it runs; version: of ONNX Runtime, the installed one
            if none.

    Raises:
        OverBudgetError: when the budget does not hold, even with half of the projections in float32.
        InputError: when the cache cannot be kept as the precision says, or ONNX Runtime does not load the result.
        DoesNotRunError: when it does not run it.
    """
    with tempfile.TemporaryDirectory(prefix="attncompile-") as folder:
        scratch = Path(folder)
        plain = scratch / "plain.onnx"
        model = onnx_ir.load(source)
        names = prepared(model, precision, opened.name)
        save(model, plain)
        del model
        ranges = None
        if precision.cache is not None:
            # eight bits have steps to spare for tokens that no text has, four do not
            more = calls(opened, 3) if precision.cache == 8 or not texts.calibration else ()
            dtype, read = precision.states or "float32", (*texts.calibration, *more)
            ranges = cached_ranges(plain, read, precision.cache, provider, version, dtype, opened.name)

        def attempt(kept: Collection[str]) -> tuple[int, Quality]:
            _remove(target)
            left = [name for name in names if name not in set(kept)]
            calibration = _calibration(opened, texts, plain, provider)
            done = write_precise(plain, target, precision, left, calibration, provider, opened.name, ranges)
            release()
            return done, measured_quality(loaded(target), texts.judged)

        done, quality = attempt(())
        said = _modules(plain)
        whole, kept = quality.worst(), tuple[str, ...]()
        if not whole <= budget:
            if not precision.kind.projections:
                raise _beyond(precision, whole, budget, quality, opened, "")
            call = (texts.calibration or calls(opened))[0]
            order = most_hurt(plain, names, precision, call, provider, scratch)
            counts = sorted({math.ceil(share * len(order)) for share in SHARES if len(order) > 1})
            found = _fewest(counts, lambda count: attempt(order[:count])[1].worst() <= budget)
            if found is None:
                raise _beyond(precision, whole, budget, quality, opened, ", also with half of them in float32")
            kept = order[:found]
            done, quality = attempt(kept)
    return Rounded(kept, tuple(_told(precision, done, kept, len(names), whole, budget, quality, said)))


def _fewest(counts: Sequence[int], holds: Callable[[int], bool]) -> int | None:
    """The smallest number for which a condition holds, by halving; ``None`` when it does not for the largest."""
    if not counts or not holds(counts[-1]):
        return None
    low, high = 0, len(counts) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(counts[middle]) else (middle + 1, high)
    return counts[low]


def _beyond(
    precision: Precision, change: float, budget: float, quality: Quality, opened: OpenedModel, more: str
) -> OverBudgetError:
    return OverBudgetError(
        f"--precision {precision} changes an output by {change:.2g} (relative, on {quality.inputs}), over the budget "
        f"of {budget:g}{more}",
        opened.name,
        "nothing was written; allow more with --budget, or take another precision",
        finite=math.isfinite(change),
    )


def _told(
    precision: Precision,
    done: int,
    kept: tuple[str, ...],
    total: int,
    whole: float,
    budget: float,
    quality: Quality,
    modules: Mapping[str, str],
) -> Iterator[str]:
    if precision.cache is not None:
        yield f"{precision}: keys and values are cached in {precision.cache} bits, with a scale for each channel"
    if not precision.kind.projections:
        if precision.kind.budget is not None:
            yield f"{precision}: {precision.kind.summary} ({done} nodes)"
        return
    rest = precision.states or "float32"
    yield f"{precision}: {done} of {total} {precision.kind.summary}; attention products stay in {rest}"
    if kept:
        yield (
            f"{len(kept)} projections were left in {rest}, the most hurt ones, because rounding all changes an output "
            f"by {whole:.2g}, over the budget of {budget:g}; now it is {quality.worst():.2g}: "
            + ", ".join(modules.get(name, name) for name in kept)
        )


def _modules(file: Path) -> dict[str, str]:
    """The path of the module that each projection was exported from, by node name, where the export says so."""
    found = {}
    for node in onnx_ir.load(file).graph:
        scopes = re.findall(r"'([^']*)'", node.metadata_props.get("pkg.torch.onnx.name_scopes", ""))
        paths = [scope for scope in scopes[:-1] if scope]
        if paths and node.name and node.op_type == "MatMul":
            found[node.name] = paths[-1]
    return found


def _calibration(opened: OpenedModel, texts: Texts, plain: Path, provider: str) -> Iterator[Feed]:
    """Inputs to take ranges from: text, or random calls of other lengths than those that are compared."""
    loaded = session(plain, provider)  # not before a precision asks for a range
    for call in texts.calibration or calls(opened, 3):
        yield feeds(loaded, call)


def _remove(file: Path) -> None:
    for stale in file.parent.glob(f"{file.name}*"):
        stale.unlink()


def rounding_changes(
    program: Program, before: onnx_ir.Model, after: onnx_ir.Model, text: Call, provider: str
) -> dict[str, Change]:
    """The change of each site's output, by name, between a rewritten model and its rounded form.

    Args:
        program: what was lifted; before, after: the models, changed in place; text: what both run on; provider: where.
    """
    outputs = _site_outputs(program, before)
    natives, found = (observed(model, text, provider, outputs.values()) for model in (before, after))
    inputs = f"{text.what}, with everything before it rounded too"
    return {
        site: difference([found[name]], [natives[name]], inputs)
        for site, name in outputs.items()
        if name in natives and name in found
    }


def _site_outputs(program: Program, model: onnx_ir.Model) -> Mapping[str, str]:
    """The value that holds each site's output: of the last node that was written for it, else the original one."""
    known = {value.name for node in model.graph for value in node.outputs}
    written = {
        node.metadata_props["attncompile.site"]: node.outputs[0].name or ""
        for node in model.graph
        if "attncompile.site" in node.metadata_props
    }
    native = {
        site.name: site.region.outputs[0].value
        for site in program.sites
        if site.region is not None and site.region.outputs[0].value in known
    }
    return native | written


__all__ = ["OverBudgetError", "Rounded", "Texts", "round_model", "rounding_changes", "texts_of"]
