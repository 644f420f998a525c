"""Laws about constants: folding, and functions of a choice between constants."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable

from attncompile.ir.evaluate import Environment, evaluate
from attncompile.ir.expr import Apply, Const, Expr, apply
from attncompile.ir.operators import OPERATORS, Kind, real

WHOLE_LIMIT = 2.0**53
"""Real numbers below this are exact integers where they have no fraction."""


def positive_zero(node: Const) -> Const:
    return Const(0.0) if isinstance(node.value, float) and node.value == 0 else node


_WHOLE_NUMBERS: dict[str, Callable[..., int]] = {
    "add": lambda *values: sum(values),
    "mul": lambda *values: math.prod(values),
    "floordiv": operator.floordiv,
    "mod": operator.mod,
    "min": min,
    "max": max,
    "abs": abs,
}


def fold_constants(node: Apply) -> Expr | None:
    values = [argument.value for argument in node.arguments if isinstance(argument, Const)]
    if len(values) < len(node.arguments) or node.operator == "where":
        return None
    if node.operator in ("floordiv", "mod") and not values[1]:
        return None
    if node.result is Kind.INT and node.operator in _WHOLE_NUMBERS:
        return Const(_WHOLE_NUMBERS[node.operator](*values))
    if any(
        abs(value) >= WHOLE_LIMIT
        if isinstance(value, int)
        else node.operator == "int" and not abs(value) < WHOLE_LIMIT
        for value in values
    ):
        return None  # not the same number in every dtype
    value = evaluate(node, Environment()).item()
    return positive_zero(Const(float(value) if node.result is Kind.FLOAT else value))


def push_into_where(node: Apply) -> Expr | None:
    """``f(where(c, 1, 0), 2)`` with constants everywhere is ``where(c, f(1, 2), f(0, 2))``."""
    if node.operator in ("where", "and", "or", "not"):
        return None
    choices = [n for n, a in enumerate(node.arguments) if isinstance(a, Apply) and a.operator == "where"]
    if len(choices) != 1 or not all(
        isinstance(a, Const) for n, a in enumerate(node.arguments) if n not in choices
    ):
        return None
    place = choices[0]
    condition, *values = node.arguments[place].children
    if not all(isinstance(value, Const) for value in values):
        return None
    if node.operator in ("floordiv", "mod") and (place == 1 or node.arguments[1] == Const(0)):
        return None  # a division by zero on the side not taken

    def over(value: Expr) -> Expr:
        return apply(node.operator, *node.arguments[:place], value, *node.arguments[place + 1 :])

    return apply("where", condition, *(over(value) for value in values))


def without_casts(node: Apply) -> Expr | None:
    """Real functions take integers as they are: ``exp(float(i))`` is ``exp(i)``."""
    arguments = [
        a.children[0] if isinstance(a, Apply) and a.operator == "float" else a for a in node.arguments
    ]
    if OPERATORS[node.operator].result is not real or arguments == list(node.arguments):
        return None
    return apply(node.operator, *arguments)


def as_real(expr: Expr) -> Expr:
    """The expression as a real number."""
    if expr.kind is not Kind.INT:
        return expr
    return Const(float(expr.value)) if isinstance(expr, Const) else apply("float", expr)


def as_whole(expr: Expr) -> Expr | None:
    """The integer expression that a real one is, if it is one."""
    match expr:
        case Apply("float", (inner,)) if inner.kind is Kind.INT:
            return inner
        case Const(float(value)) if value.is_integer() and abs(value) < WHOLE_LIMIT:
            return Const(int(value))
    return expr if expr.kind is Kind.INT else None
