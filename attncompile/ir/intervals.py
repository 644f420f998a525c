"""Interval analysis: sound bounds of an expression when its symbols lie in given ranges.

For a mask the bounds say ``all`` (true at every point of the box), ``none`` (false at every point) or ``mixed``. Ranges
may be NumPy arrays, so that one pass classifies every block of an attention map. Comparisons of integers are bounded
through the canonical form, in which each symbol stands once; there the bounds are exact.
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


def bounds(expr: Expr, ranges: Mapping[str, Interval]) -> Interval:
    """Bounds of the expression over all values of its symbols.

    Args:
        expr: the expression; canonical form gives the tightest bounds.
        ranges: index names, size names and tensor names to their ranges. An unknown index is at least 0, an unknown
            size at least 1, an unknown tensor element or score may be anything.
    """
    known: dict[Expr, Bounds] = {}

    def go(node: Expr) -> Bounds:
        if node not in known:
            known[node] = _bounds(node)
        return known[node]

    def _bounds(node: Expr) -> Bounds:
        match node:
            case Const(value):
                if isinstance(value, float) and math.isnan(value):
                    return -math.inf, math.inf
                return float(value), float(value)
            case Index(name) | Size(name):
                found = ranges.get(name)
                least = 0.0 if isinstance(node, Index) else 1.0
                return (found.low, found.high) if found else (least, math.inf)
            case Load(name, _, element):
                found = ranges.get(name)
                if found:
                    return found.low, found.high
                return (0.0, 1.0) if element is Kind.BOOL else (-math.inf, math.inf)
            case Apply(operator, arguments):
                if operator in _COMPARED and all(a.kind is Kind.INT for a in arguments):
                    return _compare(operator, *arguments)
                return OPERATORS[operator].bounds(*(go(argument) for argument in arguments))
        return -math.inf, math.inf

    def _compare(operator: str, left: Expr, right: Expr) -> Bounds:
        from attncompile.ir.simplify import simplify  # simplify proves with its own bounds; not needed at import

        # the difference in canonical form mentions each symbol once
        difference = go(simplify(left - right))
        return OPERATORS[operator].bounds(difference, (0.0, 0.0))

    low, high = go(expr)
    return Interval(low, high)


_COMPARED = ("lt", "le", "gt", "ge", "eq", "ne")


def classify(mask: Expr, ranges: Mapping[str, Interval]) -> np.ndarray[Any, np.dtype[np.int8]]:
    """Visibility of a mask in each box: an array of :class:`Visibility` values, shaped like the ranges' broadcast.

    Raises:
        ValueError: when the expression is not a truth value.
    """
    if mask.kind is not Kind.BOOL:
        raise ValueError(f"{mask} is {mask.kind}, not a mask")
    found = bounds(mask, ranges)
    low, high = np.broadcast_arrays(np.asarray(found.low), np.asarray(found.high))
    result = np.where(low >= 1, Visibility.ALL, np.where(high <= 0, Visibility.NONE, Visibility.MIXED))
    return result.astype(np.int8)
