"""Original and result on the same calls: what was run, how far apart it is, and what is judged.

A large float32 model is itself off by more than :data:`ABSOLUTE` from what it would give in exact arithmetic, so two
correct orders of its sums differ by that much. Where the original can be run in float64, what is judged is therefore
that its error does not grow by more than :data:`ABSOLUTE`.

Where the result runs in another runtime than the original, that runtime rounds in its own way before anything is
rewritten. The yardstick is then the *unrewritten* export in the same runtime: its error is what may not grow. PyTorch's
own error is stated beside it, and the export itself is held to PyTorch: by half of the digits that its dtype has, for
rounding stays far below that and a wrong export does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from attncompile.convert.calibration import Call, calls, text_call
from attncompile.convert.continued import behind_caches
from attncompile.convert.memory import Reading
from attncompile.convert.quality import Quality, is_change
from attncompile.frontends.cached import PRESENT
from attncompile.frontends.checkpoint import OpenedModel
from attncompile.frontends.errors import InputError, first_line
from attncompile.verify import EndToEnd, compare, measured
from attncompile.verify.tolerance import PIECE, all_finite, largest

ABSOLUTE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""How much the error of a whole model's outputs may grow by exact rewrites, by dtype; absolute."""

Outputs = Mapping[str, torch.Tensor]
Run = Callable[[Call], Outputs]


class DoesNotRunError(ValueError):
    """The result cannot be run on a call that the original takes, or lacks an output."""


@dataclass(frozen=True)
class Runs:
    """The forms of one model that are compared; each gives a call's outputs by name.

    Attributes:
        original: the model that was given.
        converted: the result.
        unrewritten: what the result was made from, in the result's runtime: no site replaced.
        exact: the original in float64; ``None`` for an ONNX file, which has one precision.
        runtime: name of the result's runtime where the original has another one.
    """

    original: Run
    converted: Run
    unrewritten: Run
    exact: Run | None = None
    runtime: str = ""


@dataclass(frozen=True)
class Compared:
    """What a comparison found.

    Attributes:
        entries: for the certificate.
        notes: what the reader should know about them.
    """

    entries: tuple[EndToEnd, ...]
    notes: tuple[str, ...] = ()

    def faults(self) -> tuple[EndToEnd, ...]:
        """The entries beyond their tolerances, but for changes that are larger than a budget and numbers: these are
        what was asked for, and too much of it.
        """
        return tuple(
            entry
            for entry in self.entries
            if not entry.passed and (not is_change(entry) or not math.isfinite(entry.after))
        )

    def problem(self) -> str | None:
        """The first of the faults, in words."""
        for entry in self.faults():
            before = "" if entry.before is None else f" where it was {entry.before:.3g}"
            return (
                f"{entry.metric} is {entry.after:.3g}{before} on {entry.inputs}, and {entry.tolerance:.2g} "
                f"{'more ' if entry.before is not None else ''}is allowed"
            )
        return None


def compare_runs(
    opened: OpenedModel,
    runs: Runs,
    *,
    lossy: bool,
    shift: int = 0,
    part: str = "",
    budget: float | None = None,
    texts: Sequence[Call] | None = None,
) -> Compared:
    """Run all forms on fresh calls, and after lossy passes on running text too.

    Args:
        opened: the original, for making calls; lossy, shift, part, texts: as in :func:`inputs_of`.
        runs: what to run.
        budget: as in :func:`compare_on`.

    Raises:
        DoesNotRunError: when the result fails on a call, and what it was made from does not.
    """
    return compare_on(inputs_of(opened, lossy=lossy, shift=shift, part=part, texts=texts), runs, budget)


@dataclass(frozen=True)
class Inputs:
    """What forms of a model are compared on.

    Attributes:
        calls: fresh ones; of a lossy result they must be finite.
        texts: what the change of a lossy result is judged on, a budget given; none, and errors are judged instead.
    """

    calls: tuple[Call, ...]
    texts: tuple[Call, ...] = ()

    @property
    def every(self) -> tuple[Call, ...]:
        """All of them."""
        return (*self.calls, *self.texts)


def inputs_of(
    opened: OpenedModel,
    *,
    lossy: bool,
    shift: int = 0,
    part: str = "",
    texts: Sequence[Call] | None = None,
    provider: str | None = None,
) -> Inputs:
    """What to compare forms of a model on.

    Args:
        opened: the original.
        lossy: whether the result may compute something else; then its change is judged by a budget alone.
        shift: added to the lengths of the calls, so that a verification sees others than the conversion.
        part: what is run, where it is not the whole model; for the entries.
        texts: calls on text; 512 tokens at once and behind caches unless given, and the calls where the model reads
            none.
        provider: for which operators were chosen; any, unless given.
    """
    return Inputs(_named(calls(opened, shift, provider), part), _texts(opened, texts, part) if lossy else ())


def _named(made: Sequence[Call], part: str) -> tuple[Call, ...]:
    return tuple(replace(call, what=f"{part}: {call.what}") if part else call for call in made)


def _texts(opened: OpenedModel, texts: Sequence[Call] | None, part: str) -> tuple[Call, ...]:
    if texts is None:
        given = text_call(opened)
        texts = () if given is None else (given, *behind_caches(opened, [given]))
    return tuple(texts) or _named(calls(opened), part)


def compare_on(inputs: Inputs, runs: Runs, budget: float | None = None) -> Compared:
    """Run all forms on calls, and on texts where there are any.

    Args:
        inputs: what to run them on; runs: what to run.
        budget: the largest relative change of an output, and of a tensor of the cache, on the texts of each form:
            prompts, continuations, steps, and those with padding.

    Raises:
        DoesNotRunError: when the result fails on a call, and what it was made from does not.
        InputError: when what it was made from takes no call at all.
    """
    entries: list[EndToEnd] = []
    notes: list[str] = []
    ran = 0
    with torch.no_grad():
        for call in inputs.calls:
            converted = _converted(runs, call, notes)
            if converted is not None:
                ran += 1
                wide = _in_float64(runs, call, notes)
                entries += distances(call, replace(runs, exact=wide), converted, judged=not inputs.texts)
        if not ran:
            raise _not_one(notes, inputs.calls)
        if inputs.texts:
            entries += measured_quality(runs, inputs.texts).entries(budget)
    return Compared(tuple(entries), (*notes, *runtime_notes(entries, runs.runtime)))


def _in_float64(runs: Runs, call: Call, notes: list[str]) -> Run | None:
    """The original in float64, where it runs there; else ``None``, and one note for all calls."""
    if runs.exact is None:
        return None
    try:
        found = runs.exact(call)
    except (ValueError, RuntimeError) as error:
        told = f"not compared with float64, in which the original fails: {first_line(error)}"
        notes += [told] * (told not in notes)  # once for all calls
        return None
    return lambda _: found


def _not_one(notes: Sequence[str], made: Sequence[Call]) -> ValueError:
    """The error for calls none of which could be compared."""
    if not all(_FIXED in note for note in notes):
        return DoesNotRunError("; ".join(notes))
    return InputError(
        f"{_FIXED}, and takes none of the calls that it is compared on",
        "; ".join(call.what for call in made),
        "export it with axes that vary, or for PyTorch use --target torch; nothing was written",
    )


def measured_quality(runs: Runs, texts: Sequence[Call]) -> Quality:
    """What the result changes on text, or on other calls.

    Raises:
        DoesNotRunError: when the result fails on a call, and what it was made from does not.
    """
    quality = Quality()
    with torch.no_grad():
        for call in texts:
            converted = _converted(runs, call, [])
            if converted is not None:
                quality.add(call, runs.original(call), converted)
    return quality


_FIXED = "the exported graph has fixed sizes"


def _converted(runs: Runs, call: Call, notes: list[str]) -> Outputs | None:
    """The result's outputs; ``None``, with a note, for a call that the exported or given graph does not take."""
    try:
        found = runs.converted(call)
    except (ValueError, RuntimeError) as error:
        said = first_line(error)
        try:
            runs.unrewritten(call)
        except (ValueError, RuntimeError):
            notes.append(f"{call.what} was not compared: {_FIXED} ({said})")
            return None
        raise DoesNotRunError(f"on {call.what}: {said}") from error
    if runs.original is runs.unrewritten:  # a given graph, which may be stricter than the operators in the result
        try:
            runs.original(call)
        except (ValueError, RuntimeError) as error:
            said = first_line(error)
            notes.append(f"{call.what} was not compared: the given model does not take it ({said})")
            return None
    return found


def distances(call: Call, runs: Runs, converted: Outputs, *, judged: bool) -> list[EndToEnd]:
    """How far every output is from the original and from float64, padded positions left out.

    Args:
        call: what to run.
        runs: the other forms.
        converted: the result's outputs for the call.
        judged: whether to judge how far; otherwise that is only reported, and that results are finite wherever the
            original's are is judged alone.

    Raises:
        DoesNotRunError: when an output is missing.
        ValueError: when one has another shape.
    """
    original = runs.original(call)
    exact = runs.exact(call) if runs.exact is not None else {}
    plain = runs.unrewritten(call) if runs.runtime and exact else {}
    found: list[EndToEnd] = []
    reading = Reading()

    def apart_by(left: torch.Tensor, right: torch.Tensor) -> float:
        comparison = compare(left, right)
        reading.read(left, right)
        return math.inf if comparison.misplaced else comparison.max_abs

    def distance(names: Sequence[str], one: Outputs, other: Outputs) -> float:
        return max(apart_by(call.judged(name, one[name]), call.judged(name, other[name])) for name in names)

    def state(metric: str, before: float | None, after: float, allowed: float | None, error: bool = False) -> None:
        found.append(measured(metric, before, after, call.what, allowed if judged else None, error=error))

    for what, names in _together(original).items():
        for name in names:
            if name not in converted:
                raise DoesNotRunError(f"the result has no output {name!r}; it has {', '.join(converted)}")
        dtype = original[names[0]].dtype
        allowed = ABSOLUTE.get(dtype, ABSOLUTE[torch.float32])
        apart = distance(names, converted, original)
        if not judged:
            lost = sum(_lost(call.judged(name, converted[name]), call.judged(name, original[name])) for name in names)
            found.append(measured(LOST.format(what), None, lost, call.what, 0.0))
        truths = [call.judged(name, exact[name]) for name in names if name in exact]
        finite = all(map(all_finite, truths))
        reading.read(*truths)
        if len(truths) < len(names) or not finite:
            state(f"largest difference of {what}", None, apart, allowed)
            continue
        state(f"largest difference of {what}", None, apart, None)
        own, after = distance(names, original, exact), distance(names, converted, exact)
        if names[0] not in plain:
            state(f"error of {what} against float64", own, after, allowed, error=True)
            continue
        runtime = distance(names, plain, exact)
        from_plain = distance(names, converted, plain)
        state(f"largest difference of {what} from the unrewritten export", None, from_plain, None)
        half_the_digits = math.sqrt(torch.finfo(dtype).eps) * max(map(largest, truths))
        state(_OF_THE_EXPORT.format(what), own, runtime, max(allowed, half_the_digits), error=True)
        metric = f"error of {what} against float64 in {runs.runtime} before and after rewriting"
        state(metric, runtime, after, allowed, error=True)
    return found


LOST = "elements of {} that are not finite where the original's are"
"""Metric of results that may be any number."""


def _lost(found: torch.Tensor, wanted: torch.Tensor) -> int:
    pieces = zip(wanted.reshape(-1).split(PIECE), found.reshape(-1).split(PIECE), strict=True)
    return sum(int((one.isfinite() & ~other.isfinite()).sum()) for one, other in pieces)


def _together(outputs: Outputs) -> dict[str, list[str]]:
    """Outputs that are stated as one, by what they are: all that is cached, and every other output by itself."""
    groups: dict[str, list[str]] = {}
    for name in outputs:
        groups.setdefault("the cache" if name.startswith(PRESENT) else name, []).append(name)
    return groups


_OF_THE_EXPORT = "error of {} against float64 in PyTorch and in the unrewritten export"


def runtime_notes(entries: Sequence[EndToEnd], runtime: str) -> list[str]:
    """For every output that the runtime rounds worse than PyTorch before anything is rewritten, a sentence.

    Worse means by more than :data:`ABSOLUTE` allows in float32.
    """
    start, end = _OF_THE_EXPORT.split("{}")
    worst: dict[str, EndToEnd] = {}
    for entry in entries:
        if not (entry.metric.startswith(start) and entry.metric.endswith(end)) or entry.before is None:
            continue
        grown = entry.after - entry.before
        known = worst.get(entry.metric)
        if grown > ABSOLUTE[torch.float32] and (known is None or entry.after > known.after):
            worst[entry.metric] = entry
    return [
        f"{runtime}'s own rounding of this model, unrewritten: the error of "
        f"{metric.removeprefix(start).removesuffix(end)} against float64 is {entry.after:.2g}, PyTorch's is "
        f"{entry.before:.2g} ({entry.inputs})"
        for metric, entry in worst.items()
    ]
