"""Interval analysis: sound bounds of an expression when its symbols lie in given ranges.

For a mask the bounds say ``all`` (true at every point of the box), ``none`` (false at every point) or
``mixed``. Ranges may be NumPy arrays, so that one pass classifies every block of an attention map.
Comparisons of integers are bounded through the canonical form, in which each symbol stands once; there the
bounds are exact.

Bounds of real values hold in float32 and wider: each operation is widened by its rounding. What may be NaN is
    never
proven to compare true.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from attncompile.ir.expr import Apply, Const, Expr, Index, Load, Size
from attncompile.ir.operators import OPERATORS, Bounds, Kind
from attncompile.ir.simplify import simplify


class Visibility(enum.IntEnum):
    """What a mask does in a box of positions."""

    NONE = 0
    MIXED = 1
    ALL = 2


@dataclass(frozen=True)
class Interval:
    """A closed interval; the sides are numbers or arrays of numbers (truth values count as 0 and 1)."""

    low: Any
    high: Any

    def __contains__(self, value: float) -> bool:
        return bool(np.all((self.low <= value) & (value <= self.high)))


_COMPARED = ("lt", "le", "gt", "ge", "eq", "ne")
_EXACT = ("where", "min", "max", "abs", "floor", "ceil", "round")
"""Operators that round nothing."""
_ALWAYS_DEFINED = (*_EXACT, "float", "exp", "exp2", "tanh", "sigmoid", "erf")
"""Real operators that are NaN for no argument but NaN."""
_DOMAINS = {"log": 0.0, "log2": 0.0, "sqrt": 0.0, "rsqrt": 0.0}
"""Real operators that are NaN below this argument alone."""

_FLOAT32 = np.finfo(np.float32)
_ROUNDING = 4 * float(_FLOAT32.eps)
"""Relative error allowed to one operation: a function need not round correctly."""
_EXACT_INTEGERS = 2.0**24


@dataclass(frozen=True)
class _Range:
    """Bounds, and whether the value may be NaN."""

    low: Any
    high: Any
    nan: bool

    @property
    def bounds(self) -> Bounds:
        return self.low, self.high

    @property
    def finite(self) -> bool:
        return bool(np.all(np.isfinite(self.low) & np.isfinite(self.high)))


def bounds(expr: Expr, ranges: Mapping[str, Interval]) -> Interval:
    """Bounds of the expression over all values of its symbols, NaN apart.

    Args:
        expr: the expression; canonical form gives the tightest bounds.
        ranges: index names, size names and tensor names to their ranges. An unknown index or size is at least
            0, an unknown tensor element or score may be anything.
    """
    known: dict[Expr, _Range] = {}

    def go(node: Expr) -> _Range:
        if node not in known:
            known[node] = _range(node)
        return known[node]

    def _range(node: Expr) -> _Range:
        match node:
            case Const(value):
                number = float(value)
                if math.isnan(number):
                    return _Range(-math.inf, math.inf, True)
                slack = 0.0 if node.kind is not Kind.FLOAT or _in_float32(number) else abs(number) * _ROUNDING
                return _Range(number - slack, number + slack, False)
            case Index(name) | Size(name):
                given = ranges.get(name, Interval(0.0, math.inf))
                return _Range(given.low, given.high, False)
            case Load(name, _, element) if name in ranges or element is Kind.BOOL:
                given = ranges.get(name, Interval(0.0, 1.0))
                return _Range(given.low, given.high, False)
            case Apply(operator, arguments):
                if operator in _COMPARED and all(argument.kind is Kind.INT for argument in arguments):
                    # the difference in canonical form mentions each symbol once
                    difference = go(simplify(arguments[0] - arguments[1]))
                    return _Range(*OPERATORS[operator].bounds(difference.bounds, (0.0, 0.0)), False)
                return _apply(node, [go(argument) for argument in arguments])
        return _Range(-math.inf, math.inf, node.kind is Kind.FLOAT)

    found = go(expr)
    return Interval(found.low, found.high)


def _in_float32(number: float) -> bool:
    return math.isinf(number) or (abs(number) <= float(_FLOAT32.max) and float(np.float32(number)) == number)


def _apply(node: Apply, arguments: list[_Range]) -> _Range:
    low, high = OPERATORS[node.operator].bounds(*(argument.bounds for argument in arguments))
    maybe_nan = any(argument.nan for argument in arguments)
    if node.kind is Kind.BOOL and maybe_nan and node.operator in _COMPARED:
        # NaN compares false, but as unequal
        return _Range(low, 1.0, False) if node.operator == "ne" else _Range(0.0, high, False)
    if node.kind is not Kind.FLOAT:
        # an integer made of NaN may be anything
        return (
            _Range(-math.inf, math.inf, False)
            if maybe_nan and node.operator == "int"
            else _Range(low, high, False)
        )
    if node.operator not in _EXACT:
        slack = _rounding(node, arguments, low, high)
        with np.errstate(invalid="ignore", over="ignore"):
            low, high = np.subtract(low, slack), np.add(high, slack)
            low = np.where(np.less(low, _FLOAT32.min), -math.inf, low)
            high = np.where(np.greater(high, _FLOAT32.max), math.inf, high)
    return _Range(low, high, maybe_nan or _makes_nan(node.operator, arguments))


def _rounding(node: Apply, arguments: list[_Range], low: Any, high: Any) -> Any:
    """How far float32 may be off; 0 where the result is unbounded, or an integer that float32 holds."""
    size = np.maximum(np.abs(low), np.abs(high))
    if node.operator == "float":
        return np.where((size > _EXACT_INTEGERS) & np.isfinite(size), size * _ROUNDING, 0.0)
    if node.operator == "add":
        size = sum(np.maximum(np.abs(argument.low), np.abs(argument.high)) for argument in arguments)
    slack = np.multiply(size, _ROUNDING * len(arguments)) + float(_FLOAT32.tiny)
    return np.where(np.isfinite(slack), slack, 0.0)


def _makes_nan(operator: str, arguments: list[_Range]) -> bool:
    """Whether arguments in these ranges, none of them NaN, can give NaN."""
    if operator in _ALWAYS_DEFINED:
        return False
    if operator in _DOMAINS:
        return not bool(np.all(np.asarray(arguments[0].low) >= _DOMAINS[operator]))
    if operator == "add":
        down, up = (
            [bool(np.any(np.isinf(side))) for side in sides]
            for sides in ([argument.low for argument in arguments], [argument.high for argument in arguments])
        )
        return any(down) and any(up)
    if operator == "pow":
        return not (arguments[1].finite and bool(np.all(np.asarray(arguments[0].low) > 0)))
    if operator == "div":
        divisor = arguments[1]
        return not (
            arguments[0].finite
            and bool(np.all((np.asarray(divisor.low) > 0) | (np.asarray(divisor.high) < 0)))
        )
    return not all(argument.finite for argument in arguments)


def classify(mask: Expr, ranges: Mapping[str, Interval]) -> np.ndarray[Any, np.dtype[np.int8]]:
    """Visibility of a mask in each box: an array of :class:`Visibility` values, shaped like the ranges'
    broadcast.

    Raises:
        ValueError: when the expression is not a truth value.
    """
    if mask.kind is not Kind.BOOL:
        raise ValueError(f"{mask} is {mask.kind}, not a mask")
    found = bounds(mask, ranges)
    low, high = np.broadcast_arrays(np.asarray(found.low), np.asarray(found.high))
    result = np.where(low >= 1, Visibility.ALL, np.where(high <= 0, Visibility.NONE, Visibility.MIXED))
    return result.astype(np.int8)
