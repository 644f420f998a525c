"""What divides scores by a sum over their row: a softmax with what counts beside its keys, or a plain quotient."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from attncompile.ir import Expr, Kind, simplify
from attncompile.ir.expr import TOTAL, Apply, Const, apply, substitute, walk
from attncompile.lift.exponentials import NONE, Exponents, difference, minus, plus, ratio, without_row_terms
from attncompile.lift.interpret import Interpreter
from attncompile.lift.rows import LOG_SUM, Rows, free_of_map, single, totals_over


@dataclass(frozen=True)
class Quotient:
    """How scores become weights.

    Attributes:
        kind: ``softmax``, or ``sum`` or ``l1`` of logits that are no exponentials.
        logits: over the score and loads.
        sinks: logits of what the softmax counts beside the keys.
        divisor: over the total, of ``sum`` and ``l1``.
        logarithm: whether what was read is the logarithm of the weight.
    """

    kind: Literal["softmax", "sum", "l1"]
    logits: Expr
    sinks: tuple[Expr, ...] = ()
    divisor: Expr = TOTAL
    logarithm: bool = False


def read_quotient(rows: Rows, interpreter: Interpreter, weight: Expr, keys: Expr) -> Quotient | None:
    """The normaliser of a weight that is stated over the score and the sums and maxima of its row.

    Args:
        rows: the sums and maxima, already reached by the interpretation of the weight.
        interpreter: that stops at the rows and at the score.
        weight: the weight of the key ``j``.
        keys: how many keys there are.
    """
    for base in _bases(rows, interpreter, keys):
        for written, logarithm in ((weight, False), (apply("exp", weight), True)):
            found = read_softmax(rows, interpreter, written, keys, base)
            if found is not None:
                return replace(found, logarithm=logarithm)
    return _plain(rows, interpreter, weight, keys)


def _bases(rows: Rows, interpreter: Interpreter, keys: Expr) -> Iterator[Expr]:
    """Exponents that some total sums over the keys."""
    for total, stop in rows.totals.items():
        if len(stop.indices) == 1:
            for element, _ in rows.elements(total, interpreter, keys):
                base = single(element)
                if base is not None and not free_of_map(base):
                    yield base


def read_softmax(
    rows: Rows,
    interpreter: Interpreter,
    weight: Expr,
    keys: Expr,
    base: Expr,
    further: Mapping[Expr, Exponents] | None = None,
) -> Quotient | None:
    """The softmax that a weight is.

    Args:
        rows: the sums and maxima of the row.
        interpreter: that stops at them.
        weight: over exponentials of the base, and sums of them.
        keys: how many keys there are.
        base: the logit, perhaps with something added that is the same for the whole row.
        further: more symbols that stand for sums of exponentials.
    """
    sums = totals_over(rows, interpreter, base, keys)
    sums = None if sums is None else {**sums, **(further or {})}
    found = None if sums is None else ratio(weight, sums)
    if found is None or len(found.above) != 1:
        return None
    moved = difference(found.above[0], base, free_of_map)
    if moved is None:
        return None
    below = [plus(exponent, minus(moved)) for exponent in found.below if exponent != NONE]
    beside = [exponent for exponent in below if exponent != LOG_SUM]
    if len(beside) != len(below) - 1 or any(LOG_SUM in walk(e) or not free_of_map(e) for e in beside):
        return None
    return _unshifted(rows, base, beside)


def _unshifted(rows: Rows, base: Expr, beside: list[Expr]) -> Quotient | None:
    """Logits and sinks less what is subtracted from the whole row."""
    split = without_row_terms(base, rows.is_maximum)
    if split is None:
        return None
    logits, shift = split
    sinks = tuple(plus(exponent, minus(shift)) for exponent in beside)
    if any(rows.reads(expr) for expr in (logits, *sinks)):
        return None
    return Quotient("softmax", simplify(logits), sinks)


def log_sum(rows: Rows, interpreter: Interpreter, value: Expr, keys: Expr) -> Quotient | None:
    """The softmax whose log-sum-exp a value of a row is, or ``None`` where it is none."""
    for base in _bases(rows, interpreter, keys):
        sums = totals_over(rows, interpreter, base, keys)
        found = None if sums is None else ratio(apply("exp", value), sums)
        if found is None or found.below != (Const(0.0),):
            continue
        whole = [exponent for exponent in found.above if LOG_SUM in walk(exponent)]
        beside = [exponent for exponent in found.above if exponent not in whole and exponent != NONE]
        split = without_row_terms(base, rows.is_maximum)
        if len(whole) != 1 or split is None or not all(free_of_map(exponent) for exponent in beside):
            continue
        logits, shift = split
        # log Σ exp(base) of base = logits + shift is that of the logits plus the shift
        if plus(whole[0], shift) == LOG_SUM and not any(rows.reads(expr) for expr in (logits, *beside)):
            return Quotient("softmax", simplify(logits), tuple(beside))
    return None


def factors(expr: Expr) -> tuple[list[Expr], list[Expr]]:
    """What a product multiplies with and what it divides by."""
    match expr:
        case Apply("mul", arguments):
            above: list[Expr] = []
            below: list[Expr] = []
            for argument in arguments:
                more, less = factors(argument)
                above += more
                below += less
            return above, below
        case Apply("div", (left, right)):
            (above, below), (less, more) = factors(left), factors(right)
            return above + more, below + less
    return [expr], []


def fraction(above: list[Expr], below: list[Expr]) -> Expr:
    """The product of some factors over that of others, as :func:`factors` took them apart."""
    top, bottom = (
        simplify(apply("mul", Const(1.0), *(p if p.kind is Kind.FLOAT else apply("float", p) for p in parts)))
        for parts in (above, below)
    )
    return top if bottom == Const(1.0) else simplify(apply("div", top, bottom))


def _plain(rows: Rows, interpreter: Interpreter, weight: Expr, keys: Expr) -> Quotient | None:
    """A quotient of logits by a sum over them, or over their absolute values."""
    above, below = factors(weight)
    map_factors = [part for part in above if not free_of_map(part)]
    if not map_factors or any(not free_of_map(part) for part in below):
        return None
    row_factors = [part for part in above if free_of_map(part)]
    for total, stop in rows.totals.items():
        if len(stop.indices) != 1:
            continue
        for element, place in rows.elements(total, interpreter, keys):
            if rows.beside(total, interpreter, keys, place):
                continue
            summed, under = factors(element)
            signed = [part for factor in summed for part in _without_sign(factor)]
            scale = [part for part in signed if free_of_map(part)]
            if under or Counter(map_factors) != Counter(part for part in signed if not free_of_map(part)):
                continue
            kind: Literal["sum", "l1"] = "sum" if signed == summed else "l1"
            # weight = row · map / below, and the logit that is summed is scale · map
            divisor = simplify(substitute(fraction([*scale, *below], row_factors), {stop.symbol: TOTAL}))
            logits = fraction([*scale, *map_factors], [])
            if TOTAL in walk(divisor) and not rows.reads(divisor) and not rows.reads(logits):
                return Quotient(kind, logits, divisor=divisor)
    return None


def _without_sign(factor: Expr) -> list[Expr]:
    """The factors of what a factor is the absolute value of; the factor itself where it is none."""
    match factor:
        case Apply("abs", (inner,)):
            above, below = factors(inner)
            return [factor] if below else above
    return [factor]


__all__ = ["Quotient", "factors", "fraction", "log_sum", "read_quotient", "read_softmax"]
