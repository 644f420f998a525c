"""Derivatives of expressions: by the raw score ``s``, or by an element of a real tensor that they load.

:data:`DERIVATIVES` has a row for each operator that makes a real number: the partial derivative by each argument, as
an expression again, so that it is simplified, printed and bounded like any other. Kinks take PyTorch's convention: at
a tie ``min`` and ``max`` give half to either side, ``abs`` has slope 0 at 0, rounding has slope 0 everywhere. Truth
values and integers do not vary: what passes through a comparison or an index contributes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from attncompile.ir.expr import Apply, Const, Expr, Load, Score, Weight, apply, loads, where
from attncompile.ir.operators import Kind
from attncompile.ir.simplify import simplify

NONE = Const(0.0)
"""The derivative of what does not vary."""

Partial = Callable[[tuple[Expr, ...], int], Expr]
"""The partial derivative by the argument at a position, from all the arguments."""


def _one(function: Callable[[Expr], Expr]) -> Partial:
    return lambda arguments, _: function(arguments[0])


def _of_product(factors: tuple[Expr, ...], position: int) -> Expr:
    others = [factor for number, factor in enumerate(factors) if number != position]
    return apply("mul", *others) if len(others) > 1 else others[0]


def _of_quotient(sides: tuple[Expr, ...], position: int) -> Expr:
    dividend, divisor = sides
    return apply("div", 1.0, divisor) if position == 0 else -apply("div", apply("div", dividend, divisor), divisor)


def _of_power(sides: tuple[Expr, ...], position: int) -> Expr:
    base, exponent = sides
    if position == 1:
        return apply("pow", base, exponent) * apply("log", base)
    zero = apply("eq", exponent, 0.0 if exponent.kind is Kind.FLOAT else 0)
    return where(zero, 0.0, apply("float", exponent) * apply("pow", base, exponent - 1))


def _of_extreme(operator: str) -> Partial:
    """A minimum or maximum of several arguments is taken pair by pair, from the left."""

    def partial(arguments: tuple[Expr, ...], position: int) -> Expr:
        wins = "gt" if operator == "max" else "lt"
        factors: list[Expr] = []
        if position > 0:
            before = apply(operator, *arguments[:position])
            factors.append(_share(arguments[position], before, wins))
        for number in range(max(position, 0) + 1, len(arguments)):
            so_far = apply(operator, *arguments[:number])
            factors.append(_share(so_far, arguments[number], wins))
        return apply("mul", *factors) if len(factors) > 1 else factors[0]

    return partial


def _share(own: Expr, other: Expr, wins: str) -> Expr:
    """How much of a pair's extreme follows the first of them."""
    return where(apply(wins, own, other), 1.0, where(apply("eq", own, other), 0.5, 0.0))


def _of_choice(arguments: tuple[Expr, ...], position: int) -> Expr:
    condition = arguments[0]
    return where(condition, 1.0, 0.0) if position == 1 else where(condition, 0.0, 1.0)


def _sign(x: Expr) -> Expr:
    return where(apply("gt", x, 0.0), 1.0, where(apply("lt", x, 0.0), -1.0, 0.0))


DERIVATIVES: Mapping[str, Partial] = {
    "add": _one(lambda x: Const(1.0)),
    "mul": _of_product,
    "div": _of_quotient,
    "pow": _of_power,
    "min": _of_extreme("min"),
    "max": _of_extreme("max"),
    "where": _of_choice,
    "float": _one(lambda x: Const(1.0)),
    "abs": _one(_sign),
    "exp": _one(lambda x: apply("exp", x)),
    "exp2": _one(lambda x: math.log(2.0) * apply("exp2", x)),
    "log": _one(lambda x: apply("div", 1.0, x)),
    "log2": _one(lambda x: apply("div", 1.0 / math.log(2.0), x)),
    "tanh": _one(lambda x: 1.0 - apply("tanh", x) * apply("tanh", x)),
    "sigmoid": _one(lambda x: apply("sigmoid", x) * (1.0 - apply("sigmoid", x))),
    "erf": _one(lambda x: 2.0 / math.sqrt(math.pi) * apply("exp", -(x * x))),
    "sqrt": _one(lambda x: apply("div", 0.5, apply("sqrt", x))),
    "rsqrt": _one(lambda x: -0.5 * apply("rsqrt", x) * apply("rsqrt", x) * apply("rsqrt", x)),
    "sin": _one(lambda x: apply("cos", x)),
    "cos": _one(lambda x: -apply("sin", x)),
    "floor": _one(lambda x: NONE),
    "ceil": _one(lambda x: NONE),
    "round": _one(lambda x: NONE),
}
"""For each operator with a real result: the partial derivative by an argument."""


def derivative(expr: Expr, variable: Expr) -> Expr:
    """∂expr/∂variable in canonical form; 0.0 when the expression does not depend on the variable.

    Args:
        expr: a real expression.
        variable: the raw score, the weight, or one load of a real tensor, whose element is then the variable (other
            loads of the tensor count as constants).

    Raises:
        ValueError: for an expression or a variable that is not real, and for an operator without a derivative, by name.
    """
    if expr.kind is not Kind.FLOAT:
        raise ValueError(f"{expr} is {expr.kind}; only a real expression has a derivative")
    if not isinstance(variable, Score | Weight | Load) or variable.kind is not Kind.FLOAT:
        raise ValueError(
            f"there is no derivative by {variable}: it is neither s, nor w, nor an element of a real tensor"
        )
    known: dict[Expr, Expr] = {}

    def go(node: Expr) -> Expr:
        if node not in known:
            known[node] = of(node)
        return known[node]

    def of(node: Expr) -> Expr:
        if node == variable:
            return Const(1.0)
        if not isinstance(node, Apply) or node.kind is not Kind.FLOAT:
            return NONE  # a leaf, or a truth value or integer, which stays the same for small changes
        inner = [go(argument) if argument.kind is Kind.FLOAT else NONE for argument in node.arguments]
        if all(each == NONE for each in inner):
            return NONE
        if node.operator not in DERIVATIVES:
            raise ValueError(f"the operator {node.operator!r} in {expr} has no derivative")
        if node.operator == "where":  # not a sum: the side that is not chosen may be infinite
            return where(node.arguments[0], inner[1], inner[2])
        terms = [
            _times(DERIVATIVES[node.operator](node.arguments, position), each)
            for position, each in enumerate(inner)
            if each != NONE
        ]
        terms = [term for term in terms if term != NONE]
        return apply("add", *terms) if len(terms) > 1 else terms[0] if terms else NONE

    found = simplify(go(expr))
    return found if found.kind is Kind.FLOAT else simplify(apply("float", found))


def _times(outer: Expr, inner: Expr) -> Expr:
    if inner == Const(1.0):
        return outer
    if outer == Const(1.0):
        return inner
    return NONE if outer == NONE else outer * inner


def real_loads(expr: Expr) -> tuple[Load, ...]:
    """The loads of real tensors by which the expression has a derivative other than 0, each once.

    Raises:
        ValueError: for an operator without a derivative, by name.
    """
    return tuple(load for load in loads(expr) if load.kind is Kind.FLOAT and derivative(expr, load) != NONE)


__all__ = ["DERIVATIVES", "NONE", "derivative", "real_loads"]
