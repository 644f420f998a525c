"""The operator for a Spec on a provider: what can compute it, what was measured fastest, and why.

The measurements are rows of ``measured.tsv`` (written by ``benchmarks/onnx_operators.py``): the speed of an
operator relative to the plain decomposition of the same Spec, at one length, on one device.
"""

from __future__ import annotations

import functools
import importlib.resources
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from attncompile.codegen.onnx.capabilities import (
    FROM_QUERIES,
    IN_PLACE,
    Capability,
    Provider,
    from_queries,
    in_place,
    rows_for,
)
from attncompile.codegen.onnx.dispatch import NAME, by_length
from attncompile.codegen.onnx.normalisation import OPSET
from attncompile.codegen.onnx.reading import causal_mask, fixed, group_size, scaled
from attncompile.ir.expr import TRUE, Const
from attncompile.ir.refusal import Refusal, RefusalError
from attncompile.ir.simplify import simplify
from attncompile.ir.spec import Spec

Prefer = Literal["fastest", "fused", "decomposed"]
PREFERENCES: tuple[Prefer, ...] = ("fastest", "fused", "decomposed")
LENGTHS = (128, 512, 2048)
"""Lengths that a model is chosen for when nobody says."""

CACHED = "cached"
"""Column of the table for causal masks over more keys than queries, measured on prompts with an empty cache."""

STEP = "step"
"""Column for the same masks in a step of generation: one query behind so many keys."""

WORTH_BRANCHING = 1.03
"""How much faster two operators switched at run time must be than the better one alone."""


@dataclass(frozen=True)
class Measurement:
    """One row of the table.

    Attributes:
        provider, device, onnxruntime, date: where, with what and when it was measured.
        mask: ``none``, ``tensor`` (any mask or bias), ``causal``, ``causal+tensor``, ``cached`` or ``step``.
        grouped: whether query heads share KV heads.
        length: queries and keys.
        operator: ONNX name.
        speed: time of the decomposition over the time of the operator.
    """

    provider: Provider
    device: str
    onnxruntime: str
    date: str
    mask: str
    grouped: bool
    length: int
    operator: str
    speed: float


@dataclass(frozen=True)
class Choice:
    """The operator for a site.

    Attributes:
        row: the capability row to build with.
        reason: why, in one sentence for the report.
        refused: operators that cannot compute the Spec exactly, with the reason.
    """

    row: Capability
    reason: str
    refused: tuple[tuple[str, str], ...]


@functools.cache
def measurements() -> tuple[Measurement, ...]:
    """The table that ships with the package."""
    text = importlib.resources.files(__package__).joinpath("measured.tsv").read_text(encoding="utf-8")
    lines = [line.split("\t") for line in text.splitlines() if line and not line.startswith("#")]
    head, *rows = lines
    found = []
    for line in rows:
        cell = dict(zip(head, line, strict=True))
        provider: Provider = "cuda" if cell["provider"] == "cuda" else "cpu"
        found.append(
            Measurement(
                provider,
                cell["device"],
                cell["onnxruntime"],
                cell["date"],
                cell["mask"],
                cell["grouped"] == "yes",
                int(cell["length"]),
                cell["operator"],
                float(cell["speed"]),
            )
        )
    return tuple(found)


def mask_class(spec: Spec) -> str:
    """The column of the table that the Spec's Attend belongs to."""
    attend = spec.attend()
    if attend is None:
        scan = spec.scan()
        # with steps that differ the plain form is another one, and was not measured
        return "causal" if scan is not None and scan.fixed else "stepwise"
    score = scaled(attend)
    biased = score is None or score.bias is not None
    causal = causal_mask(attend, spec.types())
    if causal is not None and causal.cached:
        return CACHED
    if causal is not None:
        return "causal" if causal.rest == TRUE and not biased else "causal+tensor"
    return "none" if simplify(attend.mask) == TRUE and not biased else "tensor"


def measured_speed(
    spec: Spec, operator: str, provider: Provider, length: int, kind: str | None = None
) -> float | None:
    """Speed relative to the decomposition, interpolated over the logarithm of the length.

    ``None`` where nothing of the kind was measured. The kind is the column of the table, the Spec's own unless given.
    """
    return _speed_at(operator, provider, length, mask_class(spec) if kind is None else kind, _is_grouped(spec))


def _is_grouped(spec: Spec) -> bool:
    attend = spec.attend()
    return attend is not None and group_size(attend, spec.types()) != 1


def _speed_at(operator: str, provider: Provider, length: int, kind: str, grouped: bool) -> float | None:
    """What :func:`measured_speed` gives, for a column of the table."""
    rows = [r for r in measurements() if (r.provider, r.mask, r.operator) == (provider, kind, operator)]
    rows = [r for r in rows if r.grouped == grouped] or rows
    points = sorted({r.length: r.speed for r in rows}.items())
    if not points:
        return None
    if length <= points[0][0]:
        return points[0][1]
    for (low, before), (high, after) in itertools.pairwise(points):
        if length <= high:
            share = math.log(length / low) / math.log(high / low)
            return before + share * (after - before)
    return points[-1][1]


def choose(
    spec: Spec,
    provider: Provider = "cpu",
    prefer: Prefer = "fastest",
    lengths: Sequence[int] = LENGTHS,
    opset: int = OPSET,
    *,
    switch: bool = True,
    longest: int | None = None,
    version: str | None = None,
    shared: bool = False,
    dtype: str | None = None,
) -> Choice:
    """The operator for the Spec's Attend or Scan.

    Args:
        spec: what to compute.
        provider: ``cpu`` or ``cuda``.
        prefer: ``fastest`` by measurement, the one ``fused`` operator that is fastest, or the ``decomposed`` form.
        lengths: lengths the model will be used with; each counts alike.
        opset: the model's standard opset.
        switch: whether two operators may be switched by length at run time; a site in a branch is in such a
            switch already.
        longest: how many positions the model has at most, where it says so.
        version: of ONNX Runtime that will run it, such as ``1.24``; the installed one where it is left out.
        shared: whether past and present keys are one buffer: all operators but one copy it.
        dtype: what the model's states are rounded to after this choice, such as ``float16``; the Spec's own unless
            given.

    Raises:
        RefusalError: for a Spec without an Attend or Scan.
        ValueError: for an unknown preference or a length below 1.
    """
    if prefer not in PREFERENCES:
        raise ValueError(f"unknown preference {prefer!r}; choose one of {', '.join(PREFERENCES)}")
    if not lengths or min(lengths) < 1:
        raise ValueError(f"the expected lengths must be at least 1, got {list(lengths)}")
    rows = rows_for(spec)
    if not rows:
        raise RefusalError(Refusal("no-onnx-form", f"{spec.name} holds no single attention or scan"))
    if shared and prefer != "decomposed" and mask_class(spec) == CACHED:
        rows = (in_place(), *rows)
    objections = {
        row.operator: _too_old(row, opset) or row.why_not(spec, provider, version, opset, dtype) for row in rows
    }
    refused = tuple((name, reason) for name, reason in objections.items() if reason is not None)
    able = [row for row in rows if objections[row.operator] is None]
    plain = next(row for row in able if row.operator == "decomposition")
    fused = [row for row in able if row is not plain]
    if prefer == "decomposed":
        return Choice(plain, "the decomposition was asked for", refused)
    if not fused:
        return Choice(plain, "no fused operator computes this exactly: " + refused[0][1], refused)
    taking = next((row for row in fused if row.operator == IN_PLACE), None)
    if taking is not None:
        told = "the buffer is written where it lies; every other operator copies it in each call"
        return Choice(taking, told, refused)
    if mask_class(spec) == CACHED:
        return _behind_a_cache(spec, plain, fused, provider, prefer, refused, longest)
    lengths = _fixed_lengths(spec) or tuple(sorted(lengths))
    speeds = {row.operator: _mean_speed(spec, row.operator, provider, lengths) for row in fused}
    known = [row for row in fused if speeds[row.operator] is not None]
    if not known:
        return Choice(fused[0], f"{fused[0].operator} fits; its speed on {provider} was not measured", refused)
    best = max(known, key=lambda row: speeds[row.operator] or 0.0)
    speed = speeds[best.operator] or 0.0
    pair = _pair(spec, known, provider, lengths) if switch and prefer == "fastest" else None
    if pair is not None and pair[1] > max(speed, 1.0) * WORTH_BRANCHING:
        best, speed = pair
    if prefer == "fastest" and speed <= 1.0:
        return Choice(plain, f"{_compared(best, 1 / speed, 'slower', provider, lengths)}", refused)
    word = "faster" if speed > 1.0 else "slower"
    told = _compared(best, speed if speed > 1.0 else 1 / speed, word, provider, lengths)
    return Choice(best, told if prefer == "fastest" else f"a fused operator was asked for; {told}", refused)


def _behind_a_cache(
    spec: Spec,
    plain: Capability,
    fused: Sequence[Capability],
    provider: Provider,
    prefer: Prefer,
    refused: tuple[tuple[str, str], ...],
    longest: int | None,
) -> Choice:
    """The operator that takes a cache for the prompts that are long enough for it, beside what serves all other calls.

    A step of generation is one query behind many keys; there no operator was measured to be faster that heads share.
    """
    taking = next((row for row in fused if row.operator == "GroupQueryAttention"), None)
    if prefer == "fused":
        told = "a fused operator was asked for; steps behind a cache are slower in it"
        return Choice(taking or fused[0], told, refused)
    if taking is None:
        told = "no operator that takes a cache computes this exactly: " + refused[0][1]
        return _for_every_call(spec, plain, fused, provider, refused, longest, told)
    if measured_speed(spec, taking.operator, provider, PROMPTS[0]) is None:
        return Choice(taking, f"{taking.operator} fits; its speed on {provider} was not measured", refused)
    least = _least_prompt(provider, _is_grouped(spec))
    if least is None:
        told = f"{taking.operator} was not measured to be faster up to {PROMPTS[-1]} tokens"
        return _for_every_call(spec, plain, fused, provider, refused, longest, told)
    queries = simplify(spec.types()[attend.query].sizes[2]) if (attend := spec.attend()) is not None else None
    most = int(queries.value) if isinstance(queries, Const) else longest
    if most is not None and most < least:
        told = f"{taking.operator} was measured to be faster from {least} queries on, here are at most {most}"
        return _for_every_call(spec, plain, fused, provider, refused, longest, told)
    speed = measured_speed(spec, taking.operator, provider, PROMPTS[-1]) or 0.0
    told = _compared(taking, speed, "faster", provider, PROMPTS[-1:])
    return Choice(from_queries(least), f"{told}, and slower below {least}, as in each step of generation", refused)


def _for_every_call(
    spec: Spec,
    plain: Capability,
    fused: Sequence[Capability],
    provider: Provider,
    refused: tuple[tuple[str, str], ...],
    longest: int | None,
    otherwise: str,
) -> Choice:
    """``MultiHeadAttention`` where it is exact and was measured to be faster in prompts and steps alike, counted alike.

    Args:
        otherwise: why the decomposition is taken where it is not.
    """
    row = next((row for row in fused if row.operator == "MultiHeadAttention"), None)
    lengths = sorted({min(length, longest or length) for length in LENGTHS})
    speed = _mean_speed(spec, row.operator, provider, lengths, (CACHED, STEP)) if row is not None else None
    if row is None or speed is None or speed <= 1.0:
        return Choice(plain, otherwise, refused)
    told = _compared(row, speed, "faster", provider, lengths)
    return Choice(row, f"{told}, in prompts and in steps behind a cache", refused)


PROMPTS = tuple(range(128, 2049, 64))
"""Lengths of a prompt among which the least is looked for that is worth a fused operator."""


def _least_prompt(provider: Provider, grouped: bool) -> int | None:
    """The least prompt for which ``GroupQueryAttention`` was measured to be worth a branch."""
    for length in PROMPTS:
        if (_speed_at("GroupQueryAttention", provider, length, CACHED, grouped) or 0.0) > WORTH_BRANCHING:
            return length
    return None


@functools.cache
def largest_prompt_threshold(provider: Provider | None = None, grouped: bool | None = None) -> int:
    """The most queries from which on prompts get another operator than steps do.

    Args:
        provider: where the model runs, anywhere unless given.
        grouped: whether several query heads share a KV head, either unless given.
    """
    columns = {
        (row.provider, row.grouped)
        for row in measurements()
        if row.mask == CACHED and provider in (None, row.provider) and grouped in (None, row.grouped)
    }
    return max((_least_prompt(*column) or 0 for column in columns), default=0)


def threshold_of(operator: str) -> int:
    """The number of queries or keys at which a row of this name takes its other operator; 0 where it has but one."""
    started = re.fullmatch(_STARTED, operator)
    switched = re.fullmatch(_SWITCHED, operator)
    return int(started[1]) if started else int(switched[2]) if switched else 0


_STARTED = FROM_QUERIES.format(least=r"(\d+)")
_SWITCHED = NAME.format(short=r"(\w+)", limit=r"(\d+)", long=r"(\w+)")


def _fixed_lengths(spec: Spec) -> tuple[int, ...]:
    """The length of the Spec's map when it is a number: the larger one, of queries and keys; or that of the keys, as
    those of an encoder that always gives as many positions.
    """
    attend = spec.attend()
    if attend is None:
        return ()
    queries, keys = (fixed(spec.types()[side].sizes[2]) for side in (attend.query, attend.key))
    return (max(keys, queries or 0),) if keys is not None else ()


def expected_speed(
    spec: Spec, operator: str, provider: Provider = "cpu", lengths: Sequence[int] = LENGTHS
) -> float | None:
    """Measured speed of an operator over the decomposition, the mean at the lengths of a Spec: its own, where it fixes
    them. ``None`` where it was not measured.
    """
    return _mean_speed(spec, operator, provider, _fixed_lengths(spec) or tuple(sorted(lengths)))


def _pair(
    spec: Spec, rows: Sequence[Capability], provider: Provider, lengths: Sequence[int]
) -> tuple[Capability, float] | None:
    """Two operators switched by length, and their mean speed, where different ones win at the ends."""
    if spec.attend() is None or len(lengths) < 2 or len(rows) < 2:
        return None

    def best_at(length: int) -> Capability:
        return max(rows, key=lambda row: measured_speed(spec, row.operator, provider, length) or 0.0)

    short, long = best_at(lengths[0]), best_at(lengths[-1])
    if short is long:
        return None
    low, high = lengths[0], lengths[-1]
    while high - low > 64:
        middle = (low + high) // 2
        faster = [measured_speed(spec, row.operator, provider, middle) or 0.0 for row in (short, long)]
        low, high = (low, middle) if faster[1] > faster[0] else (middle, high)
    speeds = [
        measured_speed(spec, (short if length <= low else long).operator, provider, length) or 0.0 for length in lengths
    ]
    return by_length(short, long, low), math.exp(math.fsum(map(math.log, speeds)) / len(speeds))


def row_named(spec: Spec, operator: str) -> Capability:
    """The row that a plan or report names, also when it names two operators switched by length.

    Raises:
        ValueError: for a name that no row has.
    """
    rows = {row.operator: row for row in rows_for(spec)}
    if operator in rows:
        return rows[operator]
    if operator == IN_PLACE and "GroupQueryAttention" in rows:
        return in_place()
    started = re.fullmatch(_STARTED, operator)
    if started and "GroupQueryAttention" in rows:
        return from_queries(int(started[1]))
    switched = re.fullmatch(_SWITCHED, operator)
    if switched and switched[1] in rows and switched[3] in rows:
        return by_length(rows[switched[1]], rows[switched[3]], int(switched[2]))
    raise ValueError(f"unknown operator {operator!r}; the known ones are {', '.join(rows) or 'none'}")


def _too_old(row: Capability, opset: int) -> str | None:
    return None if opset >= row.opset else f"{row.operator} needs opset {row.opset}, the model has {opset}"


def _mean_speed(
    spec: Spec, operator: str, provider: Provider, lengths: Sequence[int], kinds: Sequence[str | None] = (None,)
) -> float | None:
    """Geometric mean over the lengths, and over columns of the table."""
    speeds = [measured_speed(spec, operator, provider, length, kind) for length in lengths for kind in kinds]
    known = [speed for speed in speeds if speed is not None]
    return math.exp(math.fsum(map(math.log, known)) / len(known)) if len(known) == len(speeds) else None


def _compared(row: Capability, factor: float, word: str, provider: Provider, lengths: Sequence[int]) -> str:
    where = next(m for m in measurements() if m.provider == provider and m.operator in row.operator)
    verb = "is" if word == "faster" else "would be"
    at = ", ".join(map(str, lengths[:-1])) + (" and " if len(lengths) > 1 else "") + str(lengths[-1])
    return (
        f"{row.operator} {verb} {factor:.2f}x {word} than the decomposition at {at} tokens on {provider} "
        f"(measured on {where.device}, ONNX Runtime {where.onnxruntime}, {where.date})"
    )
