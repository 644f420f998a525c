"""Expressions over the columns of a WGMMA accumulator, split so that most of the work is done once for a row.

A thread holds the columns ``8n + c + 2·(lane % 4)`` of a block. With ``j = near + far`` only ``near``, which holds the
block's start and the lane's part, differs between threads; ``far`` is a literal for each register. A comparison
``j ≤ i`` written as ``i − near ≥ far`` takes one instruction for a score, and ``slope·(j − i)`` written as
``slope·(near − i) + slope·far`` one multiply-add, where the plain forms take five or six.
"""

from __future__ import annotations

from attncompile.codegen.triton.expressions import takes_reals
from attncompile.ir.expr import SCORE, Apply, Const, Expr, Index, apply, walk
from attncompile.ir.operators import Kind
from attncompile.ir.polynomial import constant as number
from attncompile.ir.polynomial import from_polynomial, plus, polynomial, times

COLUMN, NEAR, FAR = Index("j"), Index("near"), Index("far")

_MIRRORED = {"lt": "gt", "le": "ge", "gt": "lt", "ge": "le", "eq": "eq", "ne": "ne"}
_FAR = apply("float", FAR)
_STEPS = ("floor", "ceil", "round", "int", *_MIRRORED)
"""Operators whose value jumps: the last bit of their argument matters."""


def fold_columns(expr: Expr, exact: bool = False) -> Expr:
    """The expression with ``j`` split in comparisons of integers and where an integer becomes a real number.

    Both read ``near + far`` for ``j``; indices of loads keep ``j``. Sums are reordered as the simplifier does.

    Args:
        expr: over ``b h i j`` and ``s``.
        exact: whether real products must round as written.
    """
    if not isinstance(expr, Apply):
        return expr
    operator, arguments = expr.operator, expr.arguments
    if operator in _MIRRORED and all(argument.kind is Kind.INT for argument in arguments):
        return _comparison(operator, *arguments) or expr
    exact = exact or operator in _STEPS
    if operator == "float":
        return _real(arguments[0], exact)
    converted = takes_reals(operator, arguments, expr.result)
    parts = [_real(a, exact) if converted and a.kind is Kind.INT else fold_columns(a, exact) for a in arguments]
    if operator == "mul" and expr.result is Kind.FLOAT and not exact:
        return _product(parts)
    return apply(operator, *parts)


def _split(expr: Expr) -> tuple[Expr, int] | None:
    """``rest`` and ``factor`` with ``expr = rest + factor·far``, or ``None`` when it is not affine in ``j``."""
    factor, rest = 0, {}
    for monomial, value in polynomial(expr).items():
        if monomial == (COLUMN,):
            factor = value
        elif any(node == COLUMN for atom in monomial for node in walk(atom)):
            return None
        else:
            rest[monomial] = value
    if factor == 0:
        return None
    return from_polynomial(plus(rest, times(number(factor), polynomial(NEAR)))), factor


def _comparison(operator: str, left: Expr, right: Expr) -> Expr | None:
    """The comparison with the queries and ``near`` on the left, ``far`` alone on the right."""
    found = _split(left - right)
    if found is None:
        return None
    rest, factor = found
    if factor < 0:
        return apply(operator, rest, apply("mul", -factor, FAR) if factor != -1 else FAR)
    negated = from_polynomial(times(number(-1), polynomial(rest)))
    return apply(_MIRRORED[operator], negated, apply("mul", factor, FAR) if factor != 1 else FAR)


def _real(expr: Expr, exact: bool) -> Expr:
    """An integer expression as a real number: exact, since positions stay below 2^24."""
    if isinstance(expr, Const):
        return Const(float(expr.value))
    if expr.kind is not Kind.INT:
        return apply("float", fold_columns(expr, exact))
    if isinstance(expr, Apply) and expr.operator == "abs":
        return apply("abs", _real(expr.arguments[0], exact))
    found = _split(expr)
    if found is None:
        return apply("float", fold_columns(expr, exact))
    rest, factor = found
    return apply("add", apply("float", rest), _FAR if factor == 1 else apply("mul", float(factor), _FAR))


def _product(parts: list[Expr]) -> Expr:
    """A product; factors that are the same for a whole row are multiplied into a sum that ends in ``far``."""
    sums = [part for part in parts if isinstance(part, Apply) and part.operator == "add" and _reads_far(part)]
    others = [part for part in parts if part not in sums]
    if len(sums) != 1 or len(parts) != len(others) + 1 or any(map(_varies, others)):
        return apply("mul", *parts)
    terms = sums[0].children
    near = [term for term in terms if not _reads_far(term)]
    far = [term for term in terms if _reads_far(term)]
    return apply("add", apply("mul", *others, apply("add", *near)), *(apply("mul", *others, term) for term in far))


def _reads_far(expr: Expr) -> bool:
    return any(node == FAR for node in walk(expr))


def _varies(expr: Expr) -> bool:
    """Whether the value differs between the columns of a row."""
    return any(node in (COLUMN, NEAR, FAR, SCORE) for node in walk(expr))


__all__ = ["FAR", "NEAR", "fold_columns"]
