"""Expressions that are linear in one symbol: ``slope · s + offset``."""

from __future__ import annotations

from dataclasses import dataclass

from attncompile.ir.expr import SCORE, Apply, Const, Expr, apply, walk
from attncompile.ir.operators import Kind
from attncompile.ir.simplify import simplify

_NOTHING, _ONE = Const(0.0), Const(1.0)


@dataclass(frozen=True)
class Affine:
    """``slope · symbol + offset``, neither of which reads the symbol.

    Attributes:
        slope, offset: real expressions in canonical form; ``0.0`` where there is none.
    """

    slope: Expr
    offset: Expr


def affine(expr: Expr, symbol: Expr = SCORE) -> Affine | None:
    """Slope and offset of a real expression in one symbol, or ``None`` where it is not linear in it.

    Real arithmetic is reordered as the simplifier does: equal up to rounding for finite values.

    Args:
        expr: a real expression, such as the score of an ``Attend``.
        symbol: the raw score, the weight, or any other symbol.
    """
    found = _split(simplify(expr), symbol)
    return found and Affine(simplify(found.slope), simplify(found.offset))


def _split(expr: Expr, symbol: Expr) -> Affine | None:
    if expr == symbol:
        return Affine(_ONE, _NOTHING)
    if all(node != symbol for node in walk(expr)):
        return Affine(_NOTHING, expr if expr.kind is Kind.FLOAT else apply("float", expr))
    match expr:
        case Apply("add", arguments):
            parts = [_split(argument, symbol) for argument in arguments]
            known = [part for part in parts if part is not None]
            if len(known) < len(parts):
                return None
            return Affine(_sum([part.slope for part in known]), _sum([part.offset for part in known]))
        case Apply("mul", arguments):
            reading = [a for a in arguments if any(node == symbol for node in walk(a))]
            inner = _split(reading[0], symbol) if len(reading) == 1 else None
            return inner and _scaled(inner, [a for a in arguments if a is not reading[0]])
        case Apply("div", (numerator, divisor)):
            inner = None if any(node == symbol for node in walk(divisor)) else _split(numerator, symbol)
            return inner and _scaled(inner, [apply("div", 1.0, divisor)])
        case Apply("where", (condition, then, otherwise)):
            if any(node == symbol for node in walk(condition)):
                return None
            first, second = _split(then, symbol), _split(otherwise, symbol)
            if first is None or second is None:
                return None
            return Affine(_choice(condition, first.slope, second.slope),
                          _choice(condition, first.offset, second.offset))
    return None


def _sum(terms: list[Expr]) -> Expr:
    kept = [term for term in terms if term != _NOTHING]
    return apply("add", *kept) if kept else _NOTHING


def _scaled(inner: Affine, factors: list[Expr]) -> Affine:
    def times(term: Expr) -> Expr:
        return term if term == _NOTHING else apply("mul", *factors, term)

    return Affine(times(inner.slope), times(inner.offset))


def _choice(condition: Expr, then: Expr, otherwise: Expr) -> Expr:
    first, second = simplify(then), simplify(otherwise)
    return first if first == second else apply("where", condition, first, second)
