"""Integer polynomials: sums of products of expressions, in which integer arithmetic is carried out."""

from __future__ import annotations

from attncompile.ir.expr import Apply, Const, Expr, Index, Order, Size, apply
from attncompile.ir.operators import Kind

Monomial = tuple[Expr, ...]
"""Product of atoms (expressions that are no sums or products), sorted; the empty product is 1."""
Polynomial = dict[Monomial, int]
"""Monomial to its coefficient, never 0."""


def polynomial(expr: Expr) -> Polynomial:
    """An integer expression as a polynomial over its non-arithmetic parts.

    Raises:
        ValueError: when the expression is not an integer.
    """
    if expr.kind is not Kind.INT:
        raise ValueError(f"{expr} is {expr.kind}, not an integer expression")
    match expr:
        case Const(value):
            return constant(int(value))
        case Apply("add", arguments):
            return plus(*(polynomial(argument) for argument in arguments))
        case Apply("mul", arguments):
            product = constant(1)
            for argument in arguments:
                product = times(product, polynomial(argument))
            return product
    return {(expr,): 1}


def from_polynomial(poly: Polynomial) -> Expr:
    """The expression of a polynomial: positive terms first, the constant last."""
    terms: list[Expr] = []
    for mono in sorted(poly, key=lambda mono: (not mono, poly[mono] < 0, monomial_order(mono))):
        value = poly[mono]
        if not mono:
            terms.append(Const(value))
        else:
            terms.append(apply("mul", *mono) if value == 1 else apply("mul", value, *mono))
    return apply("add", *terms) if terms else Const(0)


def monomial_order(mono: Monomial) -> list[Order]:
    """Sort key of a monomial."""
    return [atom.order for atom in mono]


def constant(value: int) -> Polynomial:
    """The polynomial of a number."""
    return {(): value} if value else {}


def constant_value(poly: Polynomial) -> int | None:
    """The number that the polynomial is, or ``None`` when it has atoms."""
    return poly.get((), 0) if not any(mono for mono in poly) else None


def plus(*parts: Polynomial) -> Polynomial:
    """The sum."""
    result: Polynomial = {}
    for part in parts:
        for mono, value in part.items():
            result[mono] = result.get(mono, 0) + value
    return {mono: value for mono, value in result.items() if value}


def times(left: Polynomial, right: Polynomial) -> Polynomial:
    """The product."""
    result: Polynomial = {}
    for first, a in left.items():
        for second, b in right.items():
            mono = first + second
            if first and second:
                mono = tuple(sorted(mono, key=_order))
            result[mono] = result.get(mono, 0) + a * b
    return {mono: value for mono, value in result.items() if value}


def _order(atom: Expr) -> Order:
    return atom.order


def negated(poly: Polynomial) -> Polynomial:
    """The polynomial times −1."""
    return {mono: -value for mono, value in poly.items()}


def without(mono: Monomial, factor: Monomial) -> Monomial | None:
    """The monomial divided by another, or ``None`` when that does not divide it."""
    rest = list(mono)
    for atom in factor:
        if atom not in rest:
            return None
        rest.remove(atom)
    return tuple(rest)


def split(poly: Polynomial, mono: Monomial, factor: int) -> tuple[Polynomial, Polynomial]:
    """``q`` and ``r`` with ``poly = q · factor · mono + r``.

    The coefficients in ``r`` that ``mono`` divides are the remainders nearest to zero; the constant's, when
    the divisor is a constant, is the one in ``[0, factor)``.
    """
    quotient: Polynomial = {}
    rest: Polynomial = {}
    for term, value in poly.items():
        reduced = without(term, mono)
        if reduced is None:
            rest[term] = value
            continue
        whole = value // factor if not term else -((factor // 2 - value) // factor)
        quotient[reduced] = whole
        rest[term] = value - whole * factor
    return {m: v for m, v in quotient.items() if v}, {m: v for m, v in rest.items() if v}


def single(poly: Polynomial) -> tuple[Monomial, int] | None:
    """Monomial and coefficient of a positive divisor ``factor · size · size …``, or ``None`` for any other
    polynomial.

    A size that divides is not 0, or the division would not be defined.
    """
    if len(poly) != 1:
        return None
    ((mono, factor),) = poly.items()
    return (mono, factor) if factor > 0 and all(isinstance(atom, Size) for atom in mono) else None


def depth_first(poly: Polynomial) -> list[Expr]:
    """The atoms of the polynomial other than sizes, compound ones first."""
    atoms = {atom for mono in poly for atom in mono if not isinstance(atom, Size)}
    return sorted(atoms, key=lambda atom: (isinstance(atom, Index), atom.order))
