"""The pointwise operators an expression may use: one row each, one column per reading.

A row says how an operator is typed, printed, evaluated, bounded, and written in Triton and ONNX. Adding an
operator is adding one row; every reader (printer, parser, evaluator, interval analysis, code generators)
looks it up here.
"""

from __future__ import annotations

import enum
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


class Kind(enum.StrEnum):
    """The type of an expression's value: a truth value, a mathematical integer, or a real number."""

    BOOL = "bool"
    INT = "int"
    FLOAT = "float"


Bounds = tuple[Any, Any]
"""A closed interval ``(low, high)``: floats or NumPy arrays of floats (truth values are 0 and 1)."""


def numeric(kinds: Sequence[Kind]) -> Kind | None:
    """Integers stay integers, a real number makes the result real; truth values are refused."""
    if Kind.BOOL in kinds:
        return None
    return Kind.FLOAT if Kind.FLOAT in kinds else Kind.INT


def real(kinds: Sequence[Kind]) -> Kind | None:
    """A number in, a real number out."""
    return None if Kind.BOOL in kinds else Kind.FLOAT


def whole(kinds: Sequence[Kind]) -> Kind | None:
    """Integers in, an integer out."""
    return Kind.INT if all(kind is Kind.INT for kind in kinds) else None


def comparison(kinds: Sequence[Kind]) -> Kind | None:
    """Two numbers, or two truth values, in; a truth value out."""
    booleans = sum(kind is Kind.BOOL for kind in kinds)
    return Kind.BOOL if booleans in (0, len(kinds)) else None


def ordering(kinds: Sequence[Kind]) -> Kind | None:
    """Two numbers in, a truth value out."""
    return None if Kind.BOOL in kinds else Kind.BOOL


def logic(kinds: Sequence[Kind]) -> Kind | None:
    """Truth values in, a truth value out."""
    return Kind.BOOL if all(kind is Kind.BOOL for kind in kinds) else None


def selection(kinds: Sequence[Kind]) -> Kind | None:
    """A condition and two values of one family."""
    condition, first, second = kinds
    if condition is not Kind.BOOL:
        return None
    if first is second:
        return first
    return numeric((first, second))


def to_float(kinds: Sequence[Kind]) -> Kind | None:
    """Anything in, a real number out (true is 1)."""
    return Kind.FLOAT


def to_int(kinds: Sequence[Kind]) -> Kind | None:
    """Anything in, an integer out (truncation toward zero; true is 1)."""
    return Kind.INT


# Interval rules. Each takes the bounds of the arguments and returns sound bounds of the result. NaN, which
# arises from inf - inf and 0 * inf, means "nothing known on that side".


def _sound(low: Any, high: Any) -> Bounds:
    return np.where(np.isnan(low), -math.inf, low), np.where(np.isnan(high), math.inf, high)


def _add_bounds(*args: Bounds) -> Bounds:
    with np.errstate(invalid="ignore"):
        low, high = (functools.reduce(np.add, sides) for sides in zip(*args, strict=True))
    return _sound(low, high)


def _mul_bounds(*args: Bounds) -> Bounds:
    low, high = args[0]
    for other_low, other_high in args[1:]:
        with np.errstate(invalid="ignore"):
            products = [np.multiply(x, y) for x in (low, high) for y in (other_low, other_high)]
        # 0 * inf: the factor 0 is exact, the infinite side stands for arbitrarily large finite values
        products = [np.where(np.isnan(p), 0.0, p) for p in products]
        low, high = functools.reduce(np.minimum, products), functools.reduce(np.maximum, products)
    return _sound(low, high)


def _div_bounds(x: Bounds, y: Bounds) -> Bounds:
    crosses = (np.asarray(y[0]) <= 0) & (np.asarray(y[1]) >= 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        quotients = [np.divide(a, b) for a in x for b in y]
    quotients = [np.where(np.isnan(q), 0.0, q) for q in quotients]
    low = np.where(crosses, -math.inf, functools.reduce(np.minimum, quotients))
    high = np.where(crosses, math.inf, functools.reduce(np.maximum, quotients))
    return low, high


def _floordiv_bounds(x: Bounds, y: Bounds) -> Bounds:
    low, high = _div_bounds(x, y)
    return np.floor(low), np.floor(high)


def _mod_bounds(x: Bounds, y: Bounds) -> Bounds:
    # exact where the dividend stays within one period of a constant divisor
    divisor = np.asarray(y[0], dtype=float)
    constant = (divisor == np.asarray(y[1])) & (divisor != 0)
    safe = np.where(constant, divisor, 1.0)
    with np.errstate(invalid="ignore"):
        first, last = np.floor(np.divide(x[0], safe)), np.floor(np.divide(x[1], safe))
        one_period = constant & (first == last) & np.isfinite(first)
        low = np.where(one_period, x[0] - first * safe, 0.0)
        high = np.where(one_period, x[1] - first * safe, np.maximum(np.asarray(y[1], dtype=float) - 1, 0.0))
    negative = np.asarray(y[0]) <= 0
    low = np.where(negative & ~one_period, np.minimum(np.asarray(y[0], dtype=float), 0.0), low)
    positive = (np.asarray(x[0]) >= 0) & ~negative
    return _sound(low, np.where(positive, np.minimum(high, x[1]), high))


def _rising(function: Callable[[Any], Any]) -> Callable[[Bounds], Bounds]:
    def bounds(x: Bounds) -> Bounds:
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            return _sound(function(np.asarray(x[0], dtype=float)), function(np.asarray(x[1], dtype=float)))

    return bounds


def _rsqrt_bounds(x: Bounds) -> Bounds:
    with np.errstate(divide="ignore", invalid="ignore"):
        return _sound(1.0 / np.sqrt(np.maximum(x[1], 0.0)), 1.0 / np.sqrt(np.maximum(x[0], 0.0)))


def _wobble(*_: Bounds) -> Bounds:
    return -1.0, 1.0


def _abs_bounds(x: Bounds) -> Bounds:
    low, high = np.abs(x[0]), np.abs(x[1])
    crosses = (np.asarray(x[0]) <= 0) & (np.asarray(x[1]) >= 0)
    return np.where(crosses, 0.0, np.minimum(low, high)), np.maximum(low, high)


def _pow_bounds(x: Bounds, y: Bounds) -> Bounds:
    # of a positive base it is monotone in each argument; other bases give nothing
    positive = np.asarray(x[0]) > 0
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        powers = [np.power(np.where(positive, a, 1.0), b) for a in x for b in y]
    low, high = functools.reduce(np.minimum, powers), functools.reduce(np.maximum, powers)
    return np.where(positive, low, -math.inf), np.where(positive, high, math.inf)


def _truth(always: Any, never: Any) -> Bounds:
    return np.where(always, 1.0, 0.0), np.where(never, 0.0, 1.0)


def _not_bounds(x: Bounds) -> Bounds:
    return 1.0 - x[1], 1.0 - x[0]


def _lt_bounds(x: Bounds, y: Bounds) -> Bounds:
    return _truth(np.less(x[1], y[0]), np.greater_equal(x[0], y[1]))


def _le_bounds(x: Bounds, y: Bounds) -> Bounds:
    return _truth(np.less_equal(x[1], y[0]), np.greater(x[0], y[1]))


def _eq_bounds(x: Bounds, y: Bounds) -> Bounds:
    (a, b), (c, d) = x, y
    same = (np.asarray(a) == b) & (np.asarray(c) == d) & (np.asarray(a) == c) & np.isfinite(a)
    return _truth(same, (np.asarray(b) < c) | (np.asarray(d) < a))


def _where_bounds(c: Bounds, x: Bounds, y: Bounds) -> Bounds:
    always, never = np.asarray(c[0]) >= 1, np.asarray(c[1]) <= 0
    low = np.where(always, x[0], np.where(never, y[0], np.minimum(x[0], y[0])))
    high = np.where(always, x[1], np.where(never, y[1], np.maximum(x[1], y[1])))
    return low, high


def _min_bounds(*args: Bounds) -> Bounds:
    low, high = zip(*args, strict=True)
    return functools.reduce(np.minimum, low), functools.reduce(np.minimum, high)


def _max_bounds(*args: Bounds) -> Bounds:
    low, high = zip(*args, strict=True)
    return functools.reduce(np.maximum, low), functools.reduce(np.maximum, high)


def _log(x: Any) -> Any:
    return np.log(np.maximum(x, 0.0))


def _log2(x: Any) -> Any:
    return np.log2(np.maximum(x, 0.0))


def _sqrt(x: Any) -> Any:
    return np.sqrt(np.maximum(x, 0.0))


def _sigmoid(x: Any) -> Any:
    return 1.0 / (1.0 + np.exp(-x))


def _erf(x: Any) -> Any:
    return torch.erf(torch.as_tensor(x)).numpy()


def _fold(function: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    def folded(*args: Any) -> Any:
        result = args[0]
        for argument in args[1:]:
            result = function(result, argument)
        return result

    return folded


@dataclass(frozen=True)
class Operator:
    """One pointwise operator.

    Attributes:
        name: how it is called in text when it has no symbol.
        arity: number of arguments; ``None`` for two or more (associative operators are stored flat).
        result: argument kinds to result kind, or ``None`` when the arguments do not fit.
        torch: evaluates it on tensors (all of one device) in the dtype they have.
        bounds: interval rule, see :mod:`attncompile.ir.intervals`.
        triton: format string over the printed arguments (associative operators: over two).
        onnx: ONNX operator name (empty: decomposed by the ONNX printer, or refused by name).
        symbol, precedence: infix form; a higher precedence binds tighter.
    """

    name: str
    arity: int | None
    result: Callable[[Sequence[Kind]], Kind | None]
    torch: Callable[..., Any]
    bounds: Callable[..., Bounds]
    triton: str
    onnx: str = ""
    symbol: str = ""
    precedence: int = 0


ROWS: tuple[Operator, ...] = (
    Operator("or", None, logic, _fold(torch.logical_or), _max_bounds, "({0} | {1})", "Or", "or", 1),
    Operator("and", None, logic, _fold(torch.logical_and), _min_bounds, "({0} & {1})", "And", "and", 2),
    Operator("not", 1, logic, torch.logical_not, _not_bounds, "({0} == 0)", "Not", "not", 3),
    Operator("lt", 2, ordering, torch.lt, _lt_bounds, "({0} < {1})", "Less", "<", 4),
    Operator("le", 2, ordering, torch.le, _le_bounds, "({0} <= {1})", "LessOrEqual", "≤", 4),
    Operator("gt", 2, ordering, torch.gt, lambda x, y: _lt_bounds(y, x), "({0} > {1})", "Greater", ">", 4),
    Operator("ge", 2, ordering, torch.ge, lambda x, y: _le_bounds(y, x),
             "({0} >= {1})", "GreaterOrEqual", "≥", 4),
    Operator("eq", 2, comparison, torch.eq, _eq_bounds, "({0} == {1})", "Equal", "=", 4),
    Operator("ne", 2, comparison, torch.ne, lambda x, y: _not_bounds(_eq_bounds(x, y)),
             "({0} != {1})", "", "≠", 4),
    Operator("add", None, numeric, _fold(torch.add), _add_bounds, "({0} + {1})", "Add", "+", 5),
    Operator("mul", None, numeric, _fold(torch.mul), _mul_bounds, "({0} * {1})", "Mul", "·", 6),
    Operator("div", 2, real, torch.true_divide, _div_bounds, "({0} / {1})", "Div", "/", 6),
    Operator("floordiv", 2, whole, torch.floor_divide, _floordiv_bounds,
             "floor_divide({0}, {1})", "", "//", 6),
    Operator("mod", 2, whole, torch.remainder, _mod_bounds, "floor_modulo({0}, {1})", "Mod", "%", 6),
    Operator("pow", 2, real, torch.pow, _pow_bounds, "tl.exp2({1} * tl.log2({0}))", "Pow", "^", 8),
    Operator("min", None, numeric, _fold(torch.minimum), _min_bounds,
             "tl.minimum({0}, {1})", "Min"),
    Operator("max", None, numeric, _fold(torch.maximum), _max_bounds,
             "tl.maximum({0}, {1})", "Max"),
    Operator("where", 3, selection, torch.where, _where_bounds, "tl.where({0}, {1}, {2})", "Where"),
    Operator("float", 1, to_float, lambda x: x, lambda x: x, "tl.cast({0}, tl.float32)", "Cast"),
    Operator("int", 1, to_int, torch.trunc, _rising(np.trunc), "tl.cast({0}, tl.int32)", "Cast"),
    Operator("abs", 1, numeric, torch.abs, _abs_bounds, "tl.abs({0})", "Abs"),
    Operator("exp", 1, real, torch.exp, _rising(np.exp), "tl.exp({0})", "Exp"),
    Operator("exp2", 1, real, torch.exp2, _rising(np.exp2), "tl.exp2({0})"),
    Operator("log", 1, real, torch.log, _rising(_log), "tl.log({0})", "Log"),
    Operator("log2", 1, real, torch.log2, _rising(_log2), "tl.log2({0})"),
    Operator("tanh", 1, real, torch.tanh, _rising(np.tanh), "tanh({0})", "Tanh"),
    Operator("sigmoid", 1, real, torch.sigmoid, _rising(_sigmoid), "tl.sigmoid({0})", "Sigmoid"),
    Operator("erf", 1, real, torch.erf, _rising(_erf), "tl.erf({0})", "Erf"),
    Operator("sqrt", 1, real, torch.sqrt, _rising(_sqrt), "tl.sqrt({0})", "Sqrt"),
    Operator("rsqrt", 1, real, torch.rsqrt, _rsqrt_bounds, "tl.rsqrt({0})"),
    Operator("sin", 1, real, torch.sin, _wobble, "tl.sin({0})", "Sin"),
    Operator("cos", 1, real, torch.cos, _wobble, "tl.cos({0})", "Cos"),
    Operator("floor", 1, real, torch.floor, _rising(np.floor), "tl.floor({0})", "Floor"),
    Operator("ceil", 1, real, torch.ceil, _rising(np.ceil), "tl.ceil({0})", "Ceil"),
    Operator("round", 1, real, torch.round, _rising(np.round), "round_half_even({0})", "Round"),
)

OPERATORS: dict[str, Operator] = {row.name: row for row in ROWS}
