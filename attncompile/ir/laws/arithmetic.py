"""Laws of sums, products, quotients, powers, extrema and casts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from attncompile.ir.expr import Apply, Const, Expr, Number, Order, Score, Total, Weight, apply, walk
from attncompile.ir.laws import Law
from attncompile.ir.laws.constants import as_real, as_whole
from attncompile.ir.laws.division import settle
from attncompile.ir.laws.order import lead_key
from attncompile.ir.operators import Kind
from attncompile.ir.polynomial import (
    Polynomial,
    constant,
    constant_value,
    from_polynomial,
    negated,
    plus,
    polynomial,
    times,
)

if TYPE_CHECKING:
    from attncompile.ir.simplify import Simplifier

_SMALLEST, _LARGEST = 2.0**-126, 2.0**126
"""Range in which a constant and its reciprocal are normal numbers in float32."""


def _term_key(term: Expr) -> tuple[bool, Order]:
    return not any(isinstance(node, Score | Total | Weight) for node in walk(term)), term.order


def _sum_of(constants: list[float]) -> list[float]:
    """The constants of a sum, added where that is no overflow."""
    special = [value for value in constants if not math.isfinite(value)]
    total = sum(special) if special else sum(sorted(constants, key=abs))
    if math.isfinite(total) or special:
        return [] if total == 0 else [total]
    return sorted(constants)


def _product_of(constants: list[float]) -> list[float]:
    """The constants of a product, multiplied where that neither overflows nor loses a factor to underflow."""
    total = math.prod(constants)
    if not all(math.isfinite(value) for value in constants):
        # the size of a finite factor does not matter beside an infinite one, only its sign
        total = math.prod(math.copysign(1.0, v) if math.isfinite(v) and v else v for v in constants)
    elif not math.isfinite(total) or (total == 0 and 0 not in constants):
        sign = math.prod(math.copysign(1.0, value) for value in constants)
        first, *others = sorted(size for size in map(abs, constants) if size != 1)
        return [sign * first, *others]
    return [] if total == 1 else [0.0 if total == 0 else total]


def _parted(
    node: Apply, start: Polynomial, join: Callable[[Polynomial, Polynomial], Polynomial]
) -> tuple[Polynomial, list[float], list[Expr]]:
    """A real sum's or product's arguments: the integers among them joined, the constants, and the rest."""
    whole = start
    constants: list[float] = []
    rest: list[Expr] = []
    for argument in node.arguments:
        integer = as_whole(argument)
        if isinstance(argument, Const):
            constants.append(float(argument.value))
        elif integer is not None:
            whole = join(whole, polynomial(integer))
        else:
            rest.append(argument)
    return whole, constants, rest


def _law_add(simplifier: Simplifier, node: Apply) -> Expr:
    if node.result is Kind.INT:
        return from_polynomial(settle(simplifier, polynomial(node)))
    whole, constants, terms = _parted(node, {}, plus)
    if () in whole:
        constants.append(float(whole.pop(())))
    terms.sort(key=_term_key)
    folded: list[Expr] = [Const(value) for value in _sum_of(constants)]
    if not terms and len(folded) <= 1:
        number = as_whole(folded[0]) if folded else Const(0)
        if number is not None:
            return as_real(from_polynomial(settle(simplifier, plus(whole, polynomial(number)))))
    parts = [*terms, *([from_polynomial(settle(simplifier, whole))] if whole else []), *folded]
    return as_real(apply("add", *parts))


def _law_mul(simplifier: Simplifier, node: Apply) -> Expr:
    if node.result is Kind.INT:
        return from_polynomial(settle(simplifier, polynomial(node)))
    whole, constants, factors = _parted(node, constant(1), times)
    whole = settle(simplifier, whole)
    if whole:
        # slope · (2·i - 2·j) is -2 · slope · (j - i)
        lead = min(whole, key=lead_key)
        content = math.gcd(*whole.values()) * (1 if whole[lead] > 0 else -1)
        whole = {mono: value // content for mono, value in whole.items()}
        constants.append(float(content))
    else:
        constants.append(0.0)
    folded = _product_of(constants)
    factors.sort(key=_term_key)
    if constant_value(whole) is None:
        factors.append(from_polynomial(whole))
    if not any(factor.kind is Kind.FLOAT for factor in factors) and len(folded) <= 1:
        number = as_whole(Const(folded[0])) if folded else Const(1)
        if number is not None:
            return as_real(
                from_polynomial(times(whole, polynomial(number)) if factors else polynomial(number))
            )
    if folded == [-1.0] and any(factor.kind is Kind.FLOAT for factor in factors):
        return apply("mul", -1, *factors) if not _sums(factors) else _distributed(Const(-1), factors[0])
    if len(folded) == 1 and folded[0] != 0 and math.isfinite(folded[0]) and _sums(factors):
        return _distributed(Const(folded[0]), factors[0])
    return as_real(
        apply("mul", *(Const(value) for value in folded), *factors) if folded or factors else Const(1.0)
    )


def _sums(factors: list[Expr]) -> bool:
    """Whether the factors are one real sum, over which a constant is distributed."""
    return (
        len(factors) == 1
        and factors[0].kind is Kind.FLOAT
        and (isinstance(factors[0], Apply) and factors[0].operator == "add")
    )


def _distributed(factor: Const, total: Expr) -> Expr:
    return apply(
        "add",
        *(
            apply("mul", factor, term if term.kind is Kind.FLOAT else as_real(term))
            for term in total.children
        ),
    )


def _law_div(simplifier: Simplifier, node: Apply) -> Expr:
    left, right = node.arguments
    factor, rest = _constant_factor(right)
    if factor is not None and _SMALLEST <= abs(factor) <= _LARGEST:
        return apply("mul", 1.0 / factor, left if rest is None else apply("div", left, rest))
    factor, rest = _constant_factor(left)
    if factor is not None and factor not in (0, 1) and math.isfinite(factor):
        return apply("mul", factor, apply("div", 1.0 if rest is None else rest, right))
    match right:
        case Apply("sqrt", (square,)):
            return apply("mul", left, apply("rsqrt", square))
        case Apply("rsqrt", (square,)):
            return apply("mul", left, apply("sqrt", square))
    return node


def _constant_factor(expr: Expr) -> tuple[float | None, Expr | None]:
    """``c`` and ``x`` of ``c·x``; no ``x`` for a constant, no ``c`` for anything else."""
    match expr:
        case Const(value):
            return float(value), None
        case Apply("mul", (Const(value), *rest)) if not any(isinstance(factor, Const) for factor in rest):
            return float(value), as_real(apply("mul", *rest))
    return None, expr


def _law_pow(simplifier: Simplifier, node: Apply) -> Expr:
    base, exponent = node.arguments
    if not isinstance(exponent, Const):
        return node
    match exponent.value:
        case 0:
            return Const(1.0)
        case 1:
            return as_real(base)
        case 2:
            return as_real(apply("mul", base, base))
        case -1:
            return apply("div", 1.0, base)
        case 0.5 if base.kind is Kind.INT:  # for real bases they differ at -inf
            return apply("sqrt", base)
        case -0.5 if base.kind is Kind.INT:
            return apply("rsqrt", base)
    return node


def _law_float(simplifier: Simplifier, node: Apply) -> Expr:
    (argument,) = node.arguments
    if argument.kind is Kind.FLOAT:
        return argument
    return apply("where", argument, 1.0, 0.0) if argument.kind is Kind.BOOL else node


def _law_int(simplifier: Simplifier, node: Apply) -> Expr:
    (argument,) = node.arguments
    if argument.kind is Kind.BOOL:
        return apply("where", argument, 1, 0)
    whole = as_whole(argument)
    return node if whole is None else whole


def _law_rounding(simplifier: Simplifier, node: Apply) -> Expr:
    whole = as_whole(node.arguments[0])
    return node if whole is None else as_real(whole)


def _law_extremum(simplifier: Simplifier, node: Apply) -> Expr:
    parts = [as_real(part) if node.result is Kind.FLOAT else part for part in dict.fromkeys(node.arguments)]
    parts = _one_constant(
        sorted(dict.fromkeys(parts), key=lambda part: part.order), min if node.operator == "min" else max
    )
    if node.result is Kind.INT:
        sign = 1 if node.operator == "min" else -1
        for part in list(parts):
            others = [other for other in parts if other != part]
            if any(
                simplifier.prover.nonnegative(
                    times(constant(sign), plus(polynomial(part), negated(polynomial(other))))
                )
                for other in others
            ):
                parts = others
    return apply(node.operator, *parts)


def _one_constant(parts: list[Expr], choose: Callable[[Iterable[Number]], Number]) -> list[Expr]:
    numbers = [part.value for part in parts if isinstance(part, Const)]
    if len(numbers) < 2:
        return parts
    # NaN wins over every number
    chosen = next((value for value in numbers if value != value), choose(numbers))
    return [Const(chosen), *(part for part in parts if not isinstance(part, Const))]


LAWS: dict[str, Law] = {
    "add": _law_add,
    "mul": _law_mul,
    "div": _law_div,
    "pow": _law_pow,
    "float": _law_float,
    "int": _law_int,
    "floor": _law_rounding,
    "ceil": _law_rounding,
    "round": _law_rounding,
    "min": _law_extremum,
    "max": _law_extremum,
}
