"""Laws of floor division and remainder.

A remainder is a difference, ``x % k = x − k·(x // k)``: written so, sums of quotients and remainders cancel;
then what is left is folded again. The divisors these laws know are products of a positive number and sizes; of a sum,
such as ``P + I``, only that nothing below it holds it once.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from attncompile.ir.expr import ZERO, Apply, Expr
from attncompile.ir.laws import Law
from attncompile.ir.polynomial import (
    Monomial,
    Polynomial,
    constant,
    from_polynomial,
    monomial_order,
    negated,
    plus,
    polynomial,
    single,
    split,
    times,
    without,
)

if TYPE_CHECKING:
    from attncompile.ir.simplify import Simplifier

Divisor = tuple[Monomial, int]
"""Sizes and factor of a divisor."""


def _expr(divisor: Divisor) -> Expr:
    mono, factor = divisor
    return from_polynomial({mono: factor})


def _fits_below(simplifier: Simplifier, poly: Polynomial, by: Divisor) -> bool:
    """Whether ``0 ≤ poly < divisor``."""
    mono, factor = by
    prover = simplifier.prover.assuming_positive(mono)
    return prover.nonnegative(poly) and prover.nonnegative(plus({mono: factor}, negated(poly), constant(-1)))


def _is_remainder_of(simplifier: Simplifier, dividend: Polynomial, divisor: Polynomial) -> bool:
    """Whether ``0 ≤ dividend < divisor``, for a divisor of several terms, which may be 0 or less."""
    below = plus(divisor, negated(dividend), constant(-1))
    return simplifier.prover.nonnegative(dividend) and simplifier.prover.nonnegative(below)


def _common_factor(
    simplifier: Simplifier, poly: Polynomial, by: Divisor
) -> tuple[Divisor, Divisor, Polynomial, Polynomial] | None:
    """The largest ``f``, and ``k, y, r``: divisor ``f·k``, neither 1; ``poly = f·y + r``, ``0 ≤ r < f``."""
    mono, factor = by
    candidates = {(_shared(term, mono), math.gcd(value, factor)) for term, value in poly.items()}
    for part in sorted(candidates, key=lambda c: (len(c[0]), c[1], monomial_order(c[0])), reverse=True):
        smaller = _divided(by, part)
        if smaller is None or ((), 1) in (part, smaller):
            continue
        quotient, rest = split(poly, *part)
        if _fits_below(simplifier, rest, part):
            return part, smaller, quotient, rest
    return None


def settle(simplifier: Simplifier, poly: Polynomial) -> Polynomial:
    """The polynomial with its floor divisions and remainders cancelled against each other."""
    operators = {atom.operator for mono in poly for atom in mono if isinstance(atom, Apply)}
    if not operators & {"mod", "floordiv"}:
        return poly
    return _with_remainders(simplifier, _without_remainders(simplifier, poly))


def _without_remainders(simplifier: Simplifier, poly: Polynomial) -> Polynomial:
    terms: list[Polynomial] = [{mono: value for mono, value in poly.items() if not any(map(_is_remainder, mono))}]
    for mono, value in poly.items():
        if mono in terms[0]:
            continue
        term = constant(value)
        for atom in mono:
            term = times(term, _as_difference(simplifier, atom))
        terms.append(term)
    return plus(*terms) if len(terms) > 1 else poly


def _is_remainder(atom: Expr) -> bool:
    return isinstance(atom, Apply) and atom.operator == "mod"


def _as_difference(simplifier: Simplifier, atom: Expr) -> Polynomial:
    match atom:
        case Apply("mod", (dividend, divisor)):
            whole = times(polynomial(divisor), polynomial(simplifier(dividend // divisor)))
            return _without_remainders(simplifier, plus(polynomial(dividend), negated(whole)))
    return {(atom,): 1}


def _nesting(expr: Expr) -> int:
    """How many divisions and remainders stand inside each other."""
    own = isinstance(expr, Apply) and expr.operator in ("floordiv", "mod")
    return own + max(map(_nesting, expr.children), default=0)


def _with_remainders(simplifier: Simplifier, poly: Polynomial) -> Polynomial:
    # the deepest first: once a remainder is folded, one of it is no longer seen
    for mono in sorted(poly, key=lambda mono: (-max(map(_nesting, mono), default=0), monomial_order(mono))):
        for atom in mono:
            if not (isinstance(atom, Apply) and atom.operator == "floordiv"):
                continue
            for inner, by in _dividends(atom, poly):
                folded = _folded(simplifier, poly, mono, atom, inner, by)
                if folded is not None:
                    return _with_remainders(simplifier, folded)
    return poly


def _dividends(atom: Apply, poly: Polynomial) -> list[tuple[Expr, Divisor]]:
    """Ways to read ``x // K`` as ``y // k``: as it is, or ``(x // a) // (K / a)`` beside an ``x // a``."""
    dividend, divisor = atom.arguments
    by = single(polynomial(divisor))
    if by is None:
        return []
    found = [(dividend, by)]
    for other in sorted({a for mono in poly for a in mono}, key=lambda atom: atom.order):
        match other:
            case Apply("floordiv", (same, part)) if same == dividend and other != atom:
                smaller = single(polynomial(part))
                quotient = None if smaller is None else _divided(by, smaller)
                if quotient is not None:
                    found.append((other, quotient))
    return found


def _folded(
    simplifier: Simplifier, poly: Polynomial, mono: Monomial, atom: Expr, inner: Expr, by: Divisor
) -> Polynomial | None:
    """``c·m·inner - c·m·k·(inner // k)``, if the polynomial holds it, becomes ``c·m·(inner % k)``.

    The number in ``inner`` need not be there: ``i - 8·((i + 7) // 8)`` is ``(i + 7) % 8 - 7``. What is added to a
    polynomial would decide its form otherwise, and a comparison, which moves numbers from side to side, would go to and
    fro between two.
    """
    outer = without(mono, (atom,)) or ()
    factor = _divided((outer, -poly[mono]), by)
    if factor is None:
        return None
    scale: Polynomial = {factor[0]: factor[1]}
    whole = times(scale, _without_remainders(simplifier, polynomial(inner)))
    asked = {term: value for term, value in whole.items() if term} or whole
    if not whole or any(poly.get(term, 0) * value < value * value for term, value in asked.items()):
        return None
    remainder = polynomial(simplifier(inner % _expr(by)))
    if not any(_is_remainder(a) for m in remainder for a in m):
        return None
    return plus(poly, negated(whole), {mono: -poly[mono]}, times(scale, remainder))


def _divided(term: Divisor, by: Divisor) -> Divisor | None:
    mono = without(term[0], by[0])
    return None if mono is None or term[1] % by[1] else (mono, term[1] // by[1])


def _shared(left: Monomial, right: Monomial) -> Monomial:
    rest, shared = list(left), []
    for atom in right:
        if atom in rest:
            rest.remove(atom)
            shared.append(atom)
    return tuple(shared)


def _exact_quotient(dividend: Polynomial, divisor: Polynomial) -> Polynomial | None:
    """The quotient by a single term of any sign that divides every term; what divides is not 0."""
    if len(divisor) != 1:
        return None
    ((mono, factor),) = divisor.items()
    found: Polynomial = {}
    for term, value in dividend.items():
        rest = without(term, mono)
        if rest is None or value % factor:
            return None
        found[rest] = value // factor
    return found if mono else None


def _law_floordiv(simplifier: Simplifier, node: Apply) -> Expr:
    dividend, divisor = node.arguments
    poly, by = polynomial(dividend), single(polynomial(divisor))
    if by is None:
        whole = _exact_quotient(poly, polynomial(divisor))
        if whole is None and _is_remainder_of(simplifier, poly, polynomial(divisor)):
            return ZERO
        return node if whole is None else from_polynomial(whole)
    quotient, rest = split(poly, *by)
    if _fits_below(simplifier, rest, by):
        return from_polynomial(quotient)
    if quotient:
        return from_polynomial(quotient) + from_polynomial(rest) // divisor
    parts = _common_factor(simplifier, poly, by)
    if parts is not None:
        _, smaller, inner, _ = parts
        return from_polynomial(inner) // _expr(smaller)
    match dividend:
        case Apply("floordiv", (inner_dividend, inner_divisor)) if single(polynomial(inner_divisor)):
            return inner_dividend // (inner_divisor * divisor)
        case Apply("mod", (inner_dividend, inner_divisor)):
            larger = single(polynomial(inner_divisor))
            left = None if larger is None else _divided(larger, by)
            if left is not None:
                return (inner_dividend // divisor) % _expr(left)
    if by[0] == () and any(poly) and all(value < 0 for mono, value in poly.items() if mono):
        # a rounding up, -(-x // k), in the one way that is plainly not negative
        return -(from_polynomial(plus(negated(poly), constant(by[1] - 1))) // divisor)
    return node


def _law_mod(simplifier: Simplifier, node: Apply) -> Expr:
    dividend, divisor = node.arguments
    poly, by = polynomial(dividend), single(polynomial(divisor))
    if by is None:
        return dividend if _is_remainder_of(simplifier, poly, polynomial(divisor)) else node
    quotient, rest = split(poly, *by)
    if _fits_below(simplifier, rest, by):
        return from_polynomial(rest)
    if quotient:
        return from_polynomial(rest) % divisor
    parts = _common_factor(simplifier, poly, by)
    if parts is not None:
        factor, smaller, inner, left = parts
        return _expr(factor) * (from_polynomial(inner) % _expr(smaller)) + from_polynomial(left)
    reduced = _without_multiples(poly, by)
    return node if reduced == poly else from_polynomial(reduced) % divisor


def _without_multiples(poly: Polynomial, by: Divisor) -> Polynomial:
    """``x % k`` inside a remainder by a part of ``k`` is ``x``."""
    result: Polynomial = {}
    for mono, value in poly.items():
        product = constant(value)
        for atom in mono:
            inner: Polynomial = {(atom,): 1}
            match atom:
                case Apply("mod", (dividend, divisor)):
                    larger = single(polynomial(divisor))
                    if larger is not None and _divided(larger, by) is not None:
                        inner = polynomial(dividend)
            product = times(product, inner)
        result = plus(result, product)
    return result


LAWS: dict[str, Law] = {"floordiv": _law_floordiv, "mod": _law_mod}
