"""Sums of exponentials over sums of exponentials: the numbers that softmax, its sum and its corrections are made of.

``exp(x − m) / (t + exp(sink − m))``, ``sigmoid(lse − sink)`` and ``exp(x − (m + log(t)))`` are all quotients of such
sums. Written as that, it can be read off them what a softmax over the keys is and what counts beside the keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from attncompile.ir import Expr, simplify
from attncompile.ir.expr import Apply, Const, apply, where

Exponents = tuple[Expr, ...]
"""``(a, b)`` stands for ``exp(a) + exp(b)``."""

MOST_TERMS = 64
"""Terms of a sum beyond which it is not written out."""

NONE = Const(-math.inf)
"""The exponent of zero."""

ZERO_EXPONENT = Const(0.0)


@dataclass(frozen=True)
class Ratio:
    """``Σ exp(above) / Σ exp(below)``."""

    above: Exponents
    below: Exponents = (ZERO_EXPONENT,)


def linear(expr: Expr) -> dict[Expr, float]:
    """A real expression as a sum of other expressions times numbers; the number alone stands at ``1.0``."""
    one = Const(1.0)
    match expr:
        case Const(value):
            return {one: float(value)} if value != 0 else {}
        case Apply("add", terms):
            total: dict[Expr, float] = {}
            for term in terms:
                for part, factor in linear(term).items():
                    total[part] = total.get(part, 0.0) + factor
            return {part: factor for part, factor in total.items() if factor != 0}
        case Apply("mul", (Const(value), *rest)) if math.isfinite(value):
            factored = apply("mul", *rest) if len(rest) > 1 else rest[0]
            match factored:
                case Apply("where", (condition, then, otherwise)) if value > 0 and NONE in (then, otherwise):
                    scaled = [branch if branch == NONE else apply("mul", value, branch) for branch in (then, otherwise)]
                    return {where(condition, *scaled): 1.0}
            inner = linear(factored)
            return {part: factor * float(value) for part, factor in inner.items()} if value != 0 else {}
    return {expr: 1.0}


def sum_of(parts: Mapping[Expr, float]) -> Expr:
    """The expression that :func:`linear` took apart."""
    terms = [
        Const(factor) if part == Const(1.0) else part if factor == 1 else apply("mul", factor, _real(part))
        for part, factor in parts.items()
    ]
    return simplify(_real(apply("add", *terms))) if terms else Const(0.0)


def _real(expr: Expr) -> Expr:
    return expr if expr.kind.value == "float" else apply("float", expr)


def plus(left: Expr, right: Expr) -> Expr:
    """The sum of two exponents, equal and opposite terms dropped; a choice of −∞ stays outermost."""
    for one, other in ((left, right), (right, left)):
        match one:
            case Const(value) if value == -math.inf:
                return NONE
            case Apply("where", (condition, then, otherwise)) if NONE in (then, otherwise):
                return where(condition, plus(then, other), plus(otherwise, other))
    return sum_of(linear(apply("add", _real(left), _real(right))))


def minus(expr: Expr) -> Expr:
    """The opposite of an exponent."""
    return sum_of({part: -factor for part, factor in linear(expr).items()})


def difference(left: Expr, right: Expr, allowed: Callable[[Expr], bool]) -> Expr | None:
    """``left − right`` where it is made of allowed terms only: what the two have otherwise in common cancels.

    Two choices by the same condition differ by what both branches differ by; −∞ less −∞ may be anything.
    """
    match left, right:
        case Apply("where", (condition, *ours)), Apply("where", (other, *theirs)) if condition == other:
            pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if not (a == NONE and b == NONE)]
            found = {difference(a, b, allowed) for a, b in pairs}
            return found.pop() if len(found) == 1 else None
    parts = linear(apply("add", _real(left), apply("mul", -1.0, _real(right))))
    return sum_of(parts) if all(allowed(part) for part in parts) else None


def _times(left: Exponents, right: Exponents) -> Exponents | None:
    if len(left) * len(right) > MOST_TERMS:
        return None
    return tuple(plus(a, b) for a in left for b in right)


def _product(left: Ratio, right: Ratio) -> Ratio | None:
    above, below = _times(left.above, right.above), _times(left.below, right.below)
    return None if above is None or below is None else Ratio(above, below)


def _sum(left: Ratio, right: Ratio) -> Ratio | None:
    if left.below == right.below:
        return Ratio((*left.above, *right.above), left.below)
    first, second = _times(left.above, right.below), _times(right.above, left.below)
    below = _times(left.below, right.below)
    return None if first is None or second is None or below is None else Ratio((*first, *second), below)


def _inverse(found: Ratio) -> Ratio:
    return Ratio(found.below, found.above)


def ratio(expr: Expr, sums: Mapping[Expr, Exponents]) -> Ratio | None:
    """An expression as a quotient of sums of exponentials, or ``None`` where it is none.

    Args:
        expr: a positive real expression.
        sums: symbols that stand for sums of exponentials.
    """
    if expr in sums:
        return Ratio(sums[expr])
    match expr:
        case Const(value) if value == 0:
            return Ratio((NONE,))
        case Const(value) if 0 < value < math.inf:
            return Ratio((Const(math.log(value)),))
        case Apply("exp", (exponent,)):
            return _power(exponent, sums)
        case Apply("exp2", (exponent,)):
            return _power(apply("mul", math.log(2.0), _real(exponent)), sums)
        case Apply("sigmoid", (argument,)):  # 1 / (1 + exp(−x))
            found = _power(minus(argument), sums)
            return None if found is None else Ratio(found.below, (*found.below, *found.above))
        case Apply("where", (condition, then, otherwise)):
            first, second = ratio(then, sums), ratio(otherwise, sums)
            if first is None or second is None or len(first.above) != 1 or len(second.above) != 1:
                return None
            below = first.below if second.above == (NONE,) else second.below
            same = NONE in (*first.above, *second.above) or first.below == second.below
            return Ratio((where(condition, first.above[0], second.above[0]),), below) if same else None
        case Apply("div", (left, right)):
            first, second = ratio(left, sums), ratio(right, sums)
            return None if first is None or second is None else _product(first, _inverse(second))
        case Apply("mul" | "add" as operator, arguments):
            joined = _product if operator == "mul" else _sum
            total: Ratio | None = None
            for number, argument in enumerate(arguments):
                found = ratio(argument, sums)
                if found is None:
                    return None
                total = found if number == 0 else joined(total, found) if total is not None else None
                if total is None:
                    return None
            return total
    return None


def _power(exponent: Expr, sums: Mapping[Expr, Exponents]) -> Ratio | None:
    """``exp`` of an exponent; a logarithm in it is a factor."""
    rest: dict[Expr, float] = {}
    total: Ratio | None = Ratio((ZERO_EXPONENT,))
    for part, factor in linear(exponent).items():
        inner = None
        if isinstance(part, Apply) and part.operator == "log" and abs(factor) == 1:
            inner = ratio(part.arguments[0], sums)
        if inner is None:
            rest[part] = factor
        else:
            total = _product(total, inner if factor > 0 else _inverse(inner)) if total is not None else None
    return None if total is None else _product(total, Ratio((sum_of(rest),)))


def without_row_terms(exponent: Expr, of_row: Callable[[Expr], bool]) -> tuple[Expr, Expr] | None:
    """An exponent without the terms that belong to its row, and those terms; ``None`` where its branches differ.

    Args:
        exponent: over the score, with choices of −∞ outermost.
        of_row: whether a term is subtracted from the whole row, such as its maximum.
    """
    match exponent:
        case Const(value) if value == -math.inf:
            return exponent, NONE
        case Apply("where", (condition, then, otherwise)):
            first, second = without_row_terms(then, of_row), without_row_terms(otherwise, of_row)
            if first is None or second is None:
                return None
            terms = {term for _, term in (first, second) if term != NONE}
            if len(terms) > 1:
                return None
            return where(condition, first[0], second[0]), terms.pop() if terms else NONE
    parts = linear(exponent)
    terms_of_row = {part: factor for part, factor in parts.items() if of_row(part)}
    if not terms_of_row:
        return exponent, Const(0.0)
    return sum_of({part: factor for part, factor in parts.items() if part not in terms_of_row}), sum_of(terms_of_row)
