"""Which keys a block of queries visits: loop limits of a kernel, derived from the mask.

A program handles the queries ``row_first … row_last``. By interval analysis over them each limit of
:func:`attncompile.ir.blocks.key_bounds` becomes two scalars: the widest, inside which some query may see a
key, and the narrowest, inside which every query sees every key. A disjunction of two ranges (sinks and a
window) is visited as two ranges, so that the keys between them are never touched. What gives no limit can
still give a test per block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from attncompile.ir.blocks import key_bounds
from attncompile.ir.expr import FALSE, TRUE, Apply, Const, Expr, Index, Load, apply, walk, where
from attncompile.ir.operators import Kind
from attncompile.ir.simplify import simplify

ROW_FIRST, ROW_LAST = Index("row_first"), Index("row_last")
KEY_FIRST, KEY_LAST = Index("key_first"), Index("key_last")
ROWS = {"i": (ROW_FIRST, ROW_LAST)}
BLOCK = {**ROWS, "j": (KEY_FIRST, KEY_LAST)}

Ranges = Mapping[str, tuple[Expr, Expr]]

COARSE = 64
"""Remainders of positions by less take all values in a block."""


@dataclass(frozen=True)
class KeyRange:
    """Keys ``start ≤ j < stop``; both are scalar expressions over ``row_first row_last b h`` and sizes."""

    start: Expr
    stop: Expr


@dataclass(frozen=True)
class Visits:
    """The keys that a block of queries visits.

    Attributes:
        first: a range to visit before ``main``, as far as it lies before it, or ``None``.
        main: the range to visit.
        full: the part of ``main`` where every query of the block sees every key, or ``None``.
        test: truth value over ``key_first key_last`` too, false for a key block that no query of the block
            sees.
    """

    first: KeyRange | None
    main: KeyRange
    full: KeyRange | None
    test: Expr


def extreme(expr: Expr, upper: bool, ranges: Ranges) -> Expr | None:
    """A scalar that the integer expression never exceeds (``upper``) or falls below, or ``None`` when none is
    known.

    Args:
        expr: integer expression, best in canonical form: each symbol that stands once makes the bound tight.
        upper: which side.
        ranges: the symbols that vary, with their first and last value. All others are scalars.
    """
    if not any(isinstance(node, Index) and node.name in ranges for node in walk(expr)):
        return expr
    match expr:
        case Index(name):
            return ranges[name][upper]
        case Apply("add", arguments):
            parts = [extreme(a, upper, ranges) for a in arguments]
            return None if None in parts else apply("add", *(p for p in parts if p is not None))
        case Apply("mul", (Const(factor), *rest)) if not isinstance(factor, bool):
            inner = extreme(apply("mul", *rest), upper == (factor >= 0), ranges)
            return None if inner is None else inner * factor
        case Apply("floordiv", (dividend, Const(divisor))) if divisor > 0:
            inner = extreme(dividend, upper, ranges)
            return None if inner is None else inner // divisor
        case Apply("mod", (dividend, Const(divisor))) if divisor > 0:
            most = Const(int(divisor) - 1 if upper else 0)
            if divisor < COARSE and not (isinstance(dividend, Apply) and dividend.operator == "floordiv"):
                return most
            # within one turn a remainder grows with its dividend
            least, greatest = extreme(dividend, False, ranges), extreme(dividend, True, ranges)
            if least is None or greatest is None:
                return most
            one_turn = apply("eq", least // int(divisor), greatest // int(divisor))
            return where(one_turn, (greatest if upper else least) % int(divisor), most)
        case Apply("min" | "max" as operator, arguments):
            parts = [extreme(a, upper, ranges) for a in arguments]
            found = [p for p in parts if p is not None]
            # a minimum stays below each argument, a maximum above: one known bound is enough there
            if not found or (len(found) < len(parts) and upper != (operator == "min")):
                return None
            return apply(operator, *found)
        case Apply("where", (condition, then, otherwise)):
            sides = extreme(then, upper, ranges), extreme(otherwise, upper, ranges)
            if sides[0] is None or sides[1] is None:
                return None
            varies = any(isinstance(n, Index) and n.name in ranges for n in walk(condition))
            if varies:
                return apply("max" if upper else "min", sides[0], sides[1])
            return where(condition, sides[0], sides[1])
    return None


def possible(mask: Expr, ranges: Ranges) -> Expr:
    """A scalar truth value that holds whenever the mask holds anywhere in the ranges."""
    if not any(isinstance(node, Index) and node.name in ranges for node in walk(mask)):
        return mask
    match mask:
        case Apply("and" | "or" as operator, parts):
            return apply(operator, *(possible(p, ranges) for p in parts))
        case Apply("lt" | "le" as operator, (left, right)) if left.kind is right.kind is Kind.INT:
            low, high = extreme(left, False, ranges), extreme(right, True, ranges)
            return TRUE if low is None or high is None else apply(operator, low, high)
        case Apply("gt" | "ge" as operator, (left, right)) if left.kind is right.kind is Kind.INT:
            low, high = extreme(right, False, ranges), extreme(left, True, ranges)
            return TRUE if low is None or high is None else apply(operator, high, low)
        case Apply("eq", (left, right)) if left.kind is right.kind is Kind.INT:
            return apply("and", possible(left <= right, ranges), possible(left >= right, ranges))
        case Apply("ne", (left, right)) if left.kind is right.kind is Kind.INT:
            return apply("or", possible(left < right, ranges), possible(left > right, ranges))
        case Apply("not", (inner,)) if inner != (opposite := _opposite(inner)):
            return possible(opposite, ranges)
    return TRUE


def certain(mask: Expr, ranges: Ranges) -> Expr:
    """A scalar truth value that holds only where the mask holds everywhere in the ranges."""
    return apply("not", possible(_negated(mask), ranges))


_OPPOSITES = {"lt": "ge", "ge": "lt", "le": "gt", "gt": "le", "eq": "ne", "ne": "eq", "and": "or", "or": "and"}


def _opposite(mask: Expr) -> Expr:
    """The mask's negation, pushed inwards as far as comparisons of integers; itself where it cannot be."""
    match mask:
        case Const(bool(value)):
            return Const(not value)
        case Apply("not", (inner,)):
            return inner
        case Apply("and" | "or" as operator, parts):
            return apply(_OPPOSITES[operator], *(_negated(part) for part in parts))
        case Apply(operator, (left, right)) if operator in _OPPOSITES and left.kind is right.kind is Kind.INT:
            return apply(_OPPOSITES[operator], left, right)
    return mask


def _negated(mask: Expr) -> Expr:
    opposite = _opposite(mask)
    return apply("not", mask) if opposite == mask else opposite


@dataclass(frozen=True)
class _Limits:
    """Limits of one conjunction; ``full`` is ``None`` where its parts do not say when all is visible."""

    start: Expr
    stop: Expr
    full: KeyRange | None
    rest: tuple[Expr, ...]


def _limits(mask: Expr, key_length: Expr) -> _Limits:
    found = key_bounds(mask)
    starts: list[Expr] = [Const(0)]
    stops: list[Expr] = [key_length]
    full_starts: list[Expr] = [Const(0)]
    full_stops: list[Expr] = [key_length]
    known = not found.rest
    for limits, widest, narrowest, upper in (
        (found.lower, starts, full_starts, False),
        (found.upper, stops, full_stops, True),
    ):
        for limit in limits:
            wide, narrow = extreme(limit, upper, ROWS), extreme(limit, not upper, ROWS)
            if wide is not None:
                widest.append(wide)
            if narrow is None:
                known = False
            else:
                narrowest.append(narrow)
    full = KeyRange(_join("max", full_starts), _join("min", full_stops)) if known else None
    return _Limits(_join("max", starts), _join("min", stops), full, found.rest)


def _join(operator: str, parts: list[Expr]) -> Expr:
    return apply(operator, *parts) if len(parts) > 1 else parts[0]


def visits(mask: Expr, query_length: Expr, key_length: Expr) -> Visits:
    """What a block of queries visits under a mask.

    Args:
        mask: truth value over ``b h i j``.
        query_length, key_length: sizes of the map.
    """
    extents = {"row_first": query_length, "row_last": query_length, "i": query_length}

    def tidy(expr: Expr) -> Expr:
        return simplify(expr, extents)

    outer = _limits(mask, key_length)
    pair = next((part for part in outer.rest if _is_pair(part)), None)
    rest = tuple(part for part in outer.rest if part is not pair)
    test = apply("and", *(possible(part, BLOCK) for part in rest)) if rest else TRUE
    first: KeyRange | None = None
    start, stop, full = outer.start, outer.stop, outer.full
    if isinstance(pair, Apply):
        # the range that does not follow the queries comes first: sinks, a prefix
        one, other = sorted((_limits(part, key_length) for part in pair.arguments), key=_follows_rows)
        first_start = apply("max", outer.start, one.start)
        first_stop = apply("min", outer.stop, one.stop)
        start = apply("max", outer.start, other.start)
        # where the first range reaches into the second, the second takes over, and must not end earlier
        stop = (
            outer.stop
            if other.stop == key_length
            else apply("max", apply("min", outer.stop, other.stop), first_stop)
        )
        first = KeyRange(tidy(first_start), tidy(first_stop))
        if first.start == tidy(start):
            first = None
        if other.full is not None and not rest:
            inner = _limits(apply("and", *(p for p in _without(mask, pair))), key_length).full
            if inner is not None:
                full = KeyRange(
                    apply("max", inner.start, other.full.start), apply("min", inner.stop, other.full.stop)
                )
    elif rest:
        full = None
    main = KeyRange(tidy(start), tidy(stop))
    return Visits(first, main, full and KeyRange(tidy(full.start), tidy(full.stop)), tidy(test))


def _is_pair(part: Expr) -> bool:
    """Whether the part is a choice of two ranges, each limited in closed form."""
    if not (isinstance(part, Apply) and part.operator == "or" and len(part.arguments) == 2):
        return False
    return all(bounds.lower or bounds.upper for bounds in map(key_bounds, part.arguments))


def _follows_rows(limits: _Limits) -> tuple[bool, bool]:
    """Whether start and stop move with the queries."""
    start, stop = (any(n in (ROW_FIRST, ROW_LAST) for n in walk(e)) for e in (limits.start, limits.stop))
    return start, stop


def _without(mask: Expr, part: Expr) -> tuple[Expr, ...]:
    mask = simplify(mask)
    parts = mask.children if isinstance(mask, Apply) and mask.operator == "and" else (mask,)
    return tuple(p for p in parts if p != part) or (TRUE,)


def reads_tensors(mask: Expr) -> bool:
    """Whether the mask loads anything."""
    return any(isinstance(node, Load) for node in walk(mask))


__all__ = [
    "FALSE",
    "KEY_FIRST",
    "KEY_LAST",
    "ROW_FIRST",
    "ROW_LAST",
    "KeyRange",
    "Visits",
    "certain",
    "extreme",
    "possible",
    "reads_tensors",
    "visits",
]
