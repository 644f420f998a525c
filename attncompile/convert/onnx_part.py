"""One ONNX file of a conversion: exported, lifted, lowered, loaded, compared.

Most models become one file. An encoder-decoder with its caches becomes two, and each is rewritten and compared by
itself, on the results of the original for what it reads of the other.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import onnx_ir

from attncompile.convert.calibration import Call, calls, running_text, text_call, text_calls
from attncompile.convert.change import Change, changes_in_onnx
from attncompile.convert.comparison import Compared, DoesNotRunError, Inputs, Runs, compare_on, inputs_of
from attncompile.convert.frame import Options, disagreement, lossy_rewrites
from attncompile.convert.onnx_rewrite import Rewritten, rewrite_onnx
from attncompile.convert.onnx_runs import known_runs, runnable, running, session_results
from attncompile.convert.onnx_sites import site_certificates
from attncompile.convert.precision import Precision
from attncompile.convert.providers import kernels_of
from attncompile.convert.quality import over_budget
from attncompile.convert.rounding import Rounded, Texts, round_model, rounding_changes, texts_of
from attncompile.convert.runtime import Session, release, run, save, session
from attncompile.convert.timing import latency_measurement, size_measurement
from attncompile.convert.unrewritten import UNREWRITTEN, load_unrewritten, save_unrewritten
from attncompile.frontends.cached import Generating
from attncompile.frontends.checkpoint import OpenedModel
from attncompile.frontends.example_inputs import positions_of
from attncompile.frontends.onnx_file import reading
from attncompile.passes import PassCall
from attncompile.report import Measurement
from attncompile.verify import SiteCertificate

MODEL = "model.onnx"


@dataclass(frozen=True)
class Part:
    """What one file is made from.

    Attributes:
        file: its name.
        opened: the model, or the function of a model, that it computes.
    """

    file: str
    opened: OpenedModel

    @property
    def name(self) -> str:
        """What it is of the whole model; "" for all of it."""
        return "" if self.file == MODEL else self.file.removesuffix(".onnx")

    @property
    def before(self) -> str:
        """The file with its export, while the conversion runs."""
        return f"before_{self.file}"

    @property
    def unrewritten(self) -> str:
        """The file that keeps its export for a verification."""
        return f"{Path(UNREWRITTEN).stem}_{self.file}" if self.name else UNREWRITTEN


@dataclass(frozen=True)
class MadePart:
    """What became of a part.

    Attributes:
        part: what it is.
        rewritten: its sites; sites: their certificates.
        compared: the file against the original.
        changes: how far lossy passes moved each site, by name.
        measurements: sizes and latencies.
        notes: what the reader should know.
        rounded: whether it is in a precision that changes what it computes.
        kept: projections that such a precision left in float32.
    """

    part: Part
    rewritten: Rewritten
    sites: tuple[SiteCertificate, ...]
    compared: Compared
    changes: Mapping[str, Change]
    measurements: tuple[Measurement, ...]
    notes: tuple[str, ...]
    rounded: bool
    kept: tuple[str, ...]

    @property
    def lossy(self) -> bool:
        """Whether it may compute something else than before."""
        return self.rounded or any(outcome.lossy for outcome in self.rewritten.outcomes)


def make_part(
    part: Part,
    target: str | Path,
    requested: Sequence[PassCall],
    folder: Path,
    options: Options,
    precision: Precision | None,
    notes: tuple[str, ...],
    scratch: Path,
) -> MadePart:
    """Rewrite an export and write the result, after comparing both with the original.

    When the result does not agree, the plain decomposition is tried, and the notes say so. A precision comes last.
    At most one session is open at a time, but for the two whose latencies are compared.

    Args:
        part: what to make; its export lies in ``scratch``.
        target: what is converted, for errors.
        requested: passes to run on every site.
        folder: where to write; options: how.
        precision: of the result; ``None`` is the model's own.
        notes: of the export.
        scratch: a folder for files that are wanted while the conversion runs.

    Raises:
        InputError: when no result agrees with the original, or a budget does not hold.
    """
    opened, provider = part.opened, options.provider
    doing = f" of the {part.name}" if part.name else ""
    rounds, budget = precision is not None and precision.budget is not None, budget_of(options, precision)
    texts = texts_for(part, options.text) if rounds or options.text is not None else None
    if rounds and texts is not None:  # the same calls each time a result is judged
        texts = replace(texts, judged=texts.judged or calls(opened))
    judged = texts.judged if texts is not None else None
    inputs, known = Inputs(()), None
    longest = positions_of(opened.config) if opened.config is not None else None

    tried: list[str] = []
    for preference in dict.fromkeys((options.prefer, "decomposed")):
        options.progress(f"finding attention{doing}")
        source, kernels, untrained = onnx_ir.load(scratch / part.before), kernels_of(provider), options.allow_untrained
        rewritten = rewrite_onnx(
            source,
            opened.name,
            requested,
            kernels,
            preference,
            untrained,
            notes,
            longest,
            options.onnxruntime,
            one_buffer=isinstance(opened, Generating) and opened.shared,
            # on a CPU most of float16 is computed in float32 between two casts, so what was tried there holds
            dtype=precision.states if precision is not None and kernels != "cpu" else None,
            guarded=partial(reading, opened.path) if opened.kind == "onnx" else nullcontext,
        )
        options.progress(f"writing the model{doing}")
        _remove(folder / part.file)
        save(rewritten.model, folder / part.file)
        lossy = any(outcome.lossy for outcome in rewritten.outcomes)
        if known is None or (lossy and not inputs.texts):
            inputs = inputs_of(opened, lossy=lossy or rounds, part=part.name, texts=judged)
            results = scratch / f"{part.file}_{preference}_known"
            known = known_runs(opened, scratch / part.before, provider, inputs, results, options.progress, doing=doing)
        seen = inputs if lossy else Inputs(inputs.calls)
        told_result = running(options.progress, f"the result{doing}")
        results = scratch / f"{part.file}_{preference}"
        converted = session_results(folder / part.file, provider, seen.every, results, told_result)
        options.progress(f"comparing with the original{doing}")
        try:
            compared = compare_on(seen, replace(known, converted=converted), None if rounds else budget)
            problem = None if over_budget(compared.entries) else compared.problem()
        except DoesNotRunError as error:
            problem = str(error)
        release()
        if problem is None:
            break
        tried.append(f"with prefer={preference} the result did not agree and was dropped: {problem}")
    else:
        raise disagreement(str(problem), target)
    options.progress(f"checking every site{doing}")
    sites = site_certificates(rewritten, provider)
    release()
    changes, told = _changes(part, rewritten, scratch, provider)
    kept: tuple[str, ...] = ()
    if rounds and precision is not None and texts is not None and budget is not None:
        options.progress(f"rounding to {precision}{doing}")
        compared_with = replace(known, exact=None)  # rounding is far above what float64 would show

        def loaded(file: Path) -> Runs:
            return replace(compared_with, converted=partial(run, session(file, provider, lean=True)))

        rounded = _round(part, rewritten, folder, precision, budget, texts, loaded, options)
        told, kept, changes = [*rounded.notes, _agreed(compared), *told], rounded.kept, {**changes, **rounded.changes}
        compared = compare_on(inputs, loaded(folder / part.file), budget)
        release()
    options.progress(f"measuring{doing}")
    measured, unchanged = _measurements(part, not (rewritten.changed or rounds), folder, scratch, provider)
    release()
    said = tuple(
        f"{part.name}: {note}" if part.name else note for note in (*rewritten.notes, *told, *tried, *unchanged)
    )
    return MadePart(part, rewritten, tuple(sites), compared, changes, tuple(measured), said, rounds, kept)


def texts_for(part: Part, file: Path | None) -> Texts:
    """What a part is calibrated and judged with: the given text where it reads any.

    Raises:
        InputError: when the file cannot be read or is too short, or a whole model reads no text.
    """
    reads = bool(text_calls(part.opened, running_text(), 16, 1))
    return texts_of(part.opened, file if reads or not part.name else None)


def budget_of(options: Options, precision: Precision | None) -> float | None:
    """The largest relative change of an output: what was asked for, or the precision's own."""
    if options.budget is not None or precision is None:
        return options.budget
    return precision.budget


def finish_part(part: Part, folder: Path, scratch: Path) -> None:
    """Keep the export, which lies in ``scratch``, without its weights, where they are the original's."""
    if part.opened.kind == "torch":
        save_unrewritten(onnx_ir.load(scratch / part.before), part.opened, folder / part.unrewritten)


def _remove(file: Path) -> None:
    """Remove a model of an earlier try, with its weights."""
    for stale in file.parent.glob(f"{file.name}*"):
        stale.unlink()


@dataclass(frozen=True)
class _Rounded(Rounded):
    """With the change of each site by name."""

    changes: Mapping[str, Change] = field(default_factory=dict)


def _round(
    part: Part,
    rewritten: Rewritten,
    folder: Path,
    precision: Precision,
    budget: float,
    texts: Texts,
    loaded: Callable[[Path], Runs],
    options: Options,
) -> _Rounded:
    """Put the model in the folder in another precision."""
    provider, version = options.provider, options.onnxruntime
    with tempfile.TemporaryDirectory(prefix="attncompile-") as scratch:
        plain = Path(scratch) / part.file
        for file in folder.glob(f"{part.file}*"):
            shutil.move(file, Path(scratch) / file.name)
        made = round_model(part.opened, plain, folder / part.file, precision, budget, texts, loaded, provider, version)
        text = texts.judged[0]
        models = onnx_ir.load(plain), onnx_ir.load(folder / part.file)
        changes = rounding_changes(rewritten.program, *models, text, provider)
    return _Rounded(made.kept, made.notes, changes)


def _agreed(compared: Compared) -> str:
    """What the comparison of the float32 model found, for the reader of a rounded one."""
    apart = [entry.after for entry in compared.entries if entry.before is None and entry.metric.startswith("largest")]
    return f"before rounding, the rewritten model differed from the original by at most {max(apart, default=0.0):.2g}"


def _changes(part: Part, rewritten: Rewritten, scratch: Path, provider: str) -> tuple[dict[str, Change], list[str]]:
    """How far lossy passes moved each site on running text, and what there is to say about it."""
    rewrites = lossy_rewrites(rewritten.outcomes)
    if not rewrites:
        return {}, []
    text = text_call(part.opened)
    if text is None:
        return {}, ["the model takes no text, so the change of each site is measured on random inputs only"]
    found = changes_in_onnx(onnx_ir.load(scratch / part.before), text, provider, rewrites)
    missing = len({one.site.name for one in rewrites} - set(found))
    told = [f"{missing} sites lie in a body of If or Loop; their change is measured on random inputs only"]
    return found, told if missing else []


def _measurements(
    part: Part, unchanged: bool, folder: Path, scratch: Path, provider: str
) -> tuple[list[Measurement], list[str]]:
    """Size and latency before and after, and a sentence where nothing was changed."""
    export, file, which = scratch / part.before, folder / part.file, f" of {part.file}" if part.name else ""
    found = [size_measurement(export, file, which)]
    if unchanged:
        return found, ["nothing was rewritten: the model runs as it did, so its latency was not measured"]
    release()  # what is cached in a call was made by the original, whose weights are not needed any more
    before, after = (session(each, provider, defaults=True) for each in (runnable(export, scratch), file))
    what = "torch's own export" if part.opened.kind == "torch" else "the given file"
    timed = next((call for call in reversed(calls(part.opened)) if _runs(before, call)), None)
    if timed is None:
        return found, [f"no call that was made up runs in {what}, so its latency was not measured"]
    return [*found, latency_measurement(before, after, timed, what, which)], []


def _runs(loaded: Session, call: Call) -> bool:
    """Whether a model takes a call: its positions may be fewer, for one."""
    try:
        run(loaded, call)
    except RuntimeError:
        return False
    return True


@contextmanager
def kept_export(part: Part, folder: Path) -> Iterator[Path]:
    """A part before any site was replaced, as a file for as long as the block runs.

    Raises:
        InputError: when what the conversion kept of it is missing or damaged.
    """
    if part.opened.kind == "onnx":
        yield part.opened.path
        return
    with tempfile.TemporaryDirectory(prefix="attncompile-") as scratch:
        file = Path(scratch) / part.before
        save(load_unrewritten(folder / part.unrewritten, part.opened), file, largest=0)
        yield file


__all__ = [
    "MODEL",
    "MadePart",
    "Part",
    "budget_of",
    "finish_part",
    "kept_export",
    "make_part",
    "texts_for",
]
