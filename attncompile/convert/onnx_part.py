"""One ONNX file of a conversion: exported, lifted, lowered, loaded, compared.

Most models become one file. An encoder-decoder with its caches becomes two, and each is rewritten and compared by
itself, on the results of the original for what it reads of the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir

from attncompile.convert.agreeing import Agreeing, Making, agreeing
from attncompile.convert.calibration import Call, calls, running_text, text_call, text_calls
from attncompile.convert.change import Change, changes_in_onnx
from attncompile.convert.clean import Before
from attncompile.convert.comparison import Compared, Run
from attncompile.convert.frame import Options, lossy_rewrites
from attncompile.convert.in_precision import Retry, in_precision
from attncompile.convert.memory import release
from attncompile.convert.onnx_rewrite import Rewritten
from attncompile.convert.onnx_runs import runnable
from attncompile.convert.part import Part
from attncompile.convert.precision import Precision
from attncompile.convert.rounding import Texts, texts_of
from attncompile.convert.timing import latency_measurement, size_measurement
from attncompile.passes import PassCall
from attncompile.report import Measurement


@dataclass(frozen=True)
class MadePart:
    """What became of a part.

    Attributes:
        making: how it was made.
        agreed: the same before it was rounded, with its sites.
        compared: the file against the original.
        changes: how far lossy passes moved each site, by name.
        measurements: sizes and latencies.
        notes: what the reader should know.
        kept: projections that its precision left in float32.
    """

    making: Making
    agreed: Agreeing
    compared: Compared
    changes: Mapping[str, Change]
    measurements: tuple[Measurement, ...]
    notes: tuple[str, ...]
    kept: tuple[str, ...]

    @property
    def rewritten(self) -> Rewritten:
        """Its sites."""
        return self.agreed.rewritten

    @property
    def lossy(self) -> bool:
        """Whether it may compute something else than before."""
        return self.making.rounds or any(outcome.lossy for outcome in self.rewritten.outcomes)


def making_of(
    part: Part,
    target: str | Path,
    requested: Sequence[PassCall],
    options: Options,
    precision: Precision | None,
    notes: tuple[str, ...],
    scratch: Path,
) -> Making:
    """What all forms of a part have in common: the arguments, and the text that it is judged with.

    Raises:
        InputError: when a text was given that cannot be read, or to a model that reads none.
    """
    before = Before(scratch / part.before, options.provider)
    making = Making(part, target, requested, options, precision, notes, None, scratch, before)
    if not making.rounds and options.text is None:
        return making
    texts = texts_for(part, options.text)
    if making.rounds:  # the same calls each time a result is judged
        texts = replace(texts, judged=texts.judged or calls(part.opened))
    return replace(making, texts=texts)


def make_part(
    making: Making, folder: Path, rolled_back: Mapping[str, str] | None = None, earlier: Agreeing | None = None
) -> MadePart:
    """Rewrite an export and write the result, after comparing both with the original. A precision comes last.

    A site that fails is rolled back, and the rest stays. At most one session with the weights is open at a time.

    Args:
        making: the part; folder: where to write.
        rolled_back: sites that stay as they were, with the reason.
        earlier: what it was made into with fewer of them.

    Raises:
        InputError: when no result agrees with the original, or a budget does not hold.
    """
    part, file = making.part, folder / making.part.file
    agreed, given_up = agreeing(making, file, rolled_back or {}, earlier), list[str]()
    precise = in_precision(making, agreed, file) if making.rounds else None
    while isinstance(precise, Retry):
        making, given_up = precise.making, [*given_up, *precise.notes]
        agreed = agreeing(making, file, precise.rolled_back, agreed)
        precise = in_precision(making, agreed, file) if making.rounds else None
    rewritten, compared, kept = agreed.rewritten, agreed.compared, tuple[str, ...]()
    changes, told = _changes(making, rewritten)
    if precise is not None:
        told = [*precise.rounded.notes, _agreed(compared), *told]
        compared, kept, changes = precise.compared, precise.rounded.kept, {**changes, **precise.changes}
    release()
    making.options.progress(f"measuring{part.doing}")
    measured, unchanged = _measurements(making, agreed, file)
    release()
    said = tuple(
        f"{part.name}: {note}" if part.name else note for note in (*rewritten.notes, *told, *given_up, *unchanged)
    )
    return MadePart(making, agreed, compared, changes, tuple(measured), said, kept)


def texts_for(part: Part, file: Path | None) -> Texts:
    """What a part is calibrated and judged with: the given text where it reads any.

    Raises:
        InputError: when the file cannot be read or is too short, or a whole model reads no text.
    """
    reads = bool(text_calls(part.opened, running_text(), 16, 1))
    return texts_of(part.opened, file if reads or not part.name else None)


def _agreed(compared: Compared) -> str:
    """What the comparison of the float32 model found, for the reader of a rounded one."""
    apart = [entry.after for entry in compared.entries if entry.before is None and entry.metric.startswith("largest")]
    return f"before rounding, the rewritten model differed from the original by at most {max(apart, default=0.0):.2g}"


def _changes(making: Making, rewritten: Rewritten) -> tuple[dict[str, Change], list[str]]:
    """How far lossy passes moved each site on running text, and what there is to say about it."""
    rewrites = lossy_rewrites(rewritten.outcomes)
    if not rewrites:
        return {}, []
    text, told = text_call(making.part.opened), list[str]()
    if text is None:
        # the roundings of a model are in its graph, which has to be run; Specs are compared on random inputs anyway
        text = next(iter(calls(making.part.opened)), None)
        if any(not one.site.roundings for one in rewrites):
            told.append("the model takes no text, so the change of each site is measured on random inputs only")
        rewrites = [one for one in rewrites if one.site.roundings]
    if text is None or not rewrites:
        return {}, told
    found = changes_in_onnx(onnx_ir.load(making.export), text, making.options.provider, rewrites)
    missing = len({one.site.name for one in rewrites} - set(found))
    if missing:
        told.append(f"{missing} sites lie in a body of If or Loop; their change is measured on random inputs only")
    return found, told


def _measurements(making: Making, agreed: Agreeing, file: Path) -> tuple[list[Measurement], list[str]]:
    """Size and latency before and after, and a sentence where nothing was changed.

    The call is one that the export took before: no original and no session is wanted to know that.
    """
    part, provider, which = making.part, making.options.provider, f" of {file.name}" if making.part.name else ""
    found = [size_measurement(making.export, file, which)]
    if not (agreed.rewritten.changed or making.rounds):
        return found, ["nothing was rewritten: the model runs as it did, so its latency was not measured"]
    what = "torch's own export" if part.opened.kind == "torch" else "the given file"
    timed = next((call for call in reversed(agreed.inputs.calls) if _ran(agreed.known.unrewritten, call)), None)
    if timed is None:
        return found, [f"no call that was made up runs in {what}, so its latency was not measured"]
    export = runnable(making.export, making.scratch, part.opened.path)
    timed = replace(timed, what=timed.what.removeprefix(f"{part.name}: "))  # which file it is, is said already
    return [*found, latency_measurement(export, file, provider, timed, what, which)], []


def _ran(form: Run, call: Call) -> bool:
    """Whether a model took a call: its positions may be fewer, for one."""
    try:
        form(call)
    except (RuntimeError, ValueError):
        return False
    return True


__all__ = ["MadePart", "make_part", "making_of", "texts_for"]
