"""What a score map has once for each row: maxima and sums over the keys, as symbols that interpretation stops at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from attncompile.frontends.graph import Graph, Indices, Reduce
from attncompile.ir import Expr, Index, Kind, Load
from attncompile.ir.expr import SCORE, Const, symbols, walk
from attncompile.lift.exponentials import Exponents, difference, plus, ratio
from attncompile.lift.interpret import Interpreter, Stop

KEY = Index("j")

LOG_SUM = Load("row_log_sum", (), Kind.FLOAT)
"""The log of the sum over all keys of the exponentials of the base."""

MOST_SINKS = 16
"""Positions beside the keys up to which a normaliser is stated with a sink."""


@dataclass(frozen=True)
class Rows:
    """The sums and maxima over rows among the values between two values.

    Attributes:
        graph: the graph.
        totals, maxima: the stop of each, by the value it makes.
    """

    graph: Graph
    totals: Mapping[str, Stop]
    maxima: Mapping[str, Stop]

    @classmethod
    def before(cls, graph: Graph, value: str, behind: frozenset[str]) -> Rows:
        """The rows that a value is made of, within ``behind``."""
        found: dict[str, dict[str, Stop]] = {"sum": {}, "max": {}}
        for name in sorted(graph.ancestors([value], behind)):
            node = graph.producer.get(name)
            if isinstance(node, Reduce) and len(node.axes) == 1:
                stops = found[node.operator]
                stops[name] = Stop(Load(f"row_{node.operator}_{len(stops)}", (), Kind.FLOAT))
        return cls(graph, found["sum"], found["max"])

    def without_totals(self) -> Rows:
        """The maxima alone."""
        return Rows(self.graph, {}, self.maxima)

    @property
    def stops(self) -> dict[str, Stop]:
        """All stops by value."""
        return {**self.totals, **self.maxima}

    def is_maximum(self, expr: Expr) -> bool:
        """Whether an expression reads a maximum of the row."""
        shifts = {stop.symbol for stop in self.maxima.values()}
        return any(node in shifts for node in walk(expr))

    def reads(self, expr: Expr) -> bool:
        """Whether an expression reads any sum or maximum."""
        stops = {stop.symbol for stop in self.stops.values()}
        return any(node in stops for node in walk(expr))

    def of_one_row(self) -> bool:
        """Whether nothing was read off another row, or once for each key."""
        return all(
            len(stop.indices) <= 1 and not any(KEY in symbols(x) for indices in stop.indices for x in indices)
            for stop in self.stops.values()
        )

    def elements(self, total: str, interpreter: Interpreter, keys: Expr) -> Iterator[tuple[Expr, Expr]]:
        """Ways to take the elements that a total sums as one for each key, with further ones in front or behind.

        Yields:
            The element that belongs to the key ``j`` and the position it is at.
        """
        node = self.graph.producer[total]
        assert isinstance(node, Reduce)
        others = interpreter.simplifier(self.graph.infos[node.source].shape[node.axes[0]] - keys)
        if not isinstance(others, Const) or not 0 <= int(others.value) <= MOST_SINKS:
            return
        for leading in range(int(others.value) + 1):
            place = interpreter.simplifier(KEY + leading)
            yield self.element(total, interpreter, place), place

    def element(self, total: str, interpreter: Interpreter, place: Expr) -> Expr:
        """The element of a total's source at a position along the summed axis."""
        node = self.graph.producer[total]
        assert isinstance(node, Reduce)
        return interpreter.at(node.source, self._inserted(node, total, place))

    def beside(self, total: str, interpreter: Interpreter, keys: Expr, place: Expr) -> list[Expr]:
        """The elements that a total sums beside those of the keys, which begin ``place − j`` after its start."""
        node = self.graph.producer[total]
        assert isinstance(node, Reduce)
        leading = interpreter.simplifier(place - KEY)
        others = interpreter.simplifier(self.graph.infos[node.source].shape[node.axes[0]] - keys)
        assert isinstance(leading, Const) and isinstance(others, Const)
        first, count = int(leading.value), int(others.value)
        positions = [
            *(Const(n) for n in range(first)),
            *(interpreter.simplifier(keys + n) for n in range(first, count)),
        ]
        return [self.element(total, interpreter, position) for position in positions]

    def _inserted(self, node: Reduce, total: str, place: Expr) -> Indices:
        (kept,) = self.totals[total].indices
        (axis,) = node.axes
        rest = list(kept)
        if node.keeps_axes:
            del rest[axis]
        return (*rest[:axis], place, *rest[axis:])


def free_of_map(expr: Expr) -> bool:
    """Whether an expression is the same for all keys of a row."""
    return SCORE not in symbols(expr) and KEY not in symbols(expr)


def totals_over(rows: Rows, interpreter: Interpreter, base: Expr, keys: Expr) -> dict[Expr, Exponents] | None:
    """Every total as a sum of exponentials: that over the keys, of ``base`` plus something, and what is beside.

    Returns:
        The exponents of each total's symbol, or ``None`` where some total is none over the exponentials of the base.
    """
    found: dict[Expr, Exponents] = {}
    for total, stop in rows.totals.items():
        if not stop.indices:
            continue
        for element, place in rows.elements(total, interpreter, keys):
            exponent = single(element)
            moved = None if exponent is None else difference(exponent, base, free_of_map)
            if moved is None:
                continue
            beside = [single(other) for other in rows.beside(total, interpreter, keys, place)]
            if any(other is None or not free_of_map(other) for other in beside):
                continue
            found[stop.symbol] = (plus(LOG_SUM, moved), *(other for other in beside if other is not None))
            break
        else:
            return None
    return found


def single(expr: Expr) -> Expr | None:
    """The logarithm of an exponential, or ``None`` where the expression is none."""
    found = ratio(expr, {})
    if found is None or len(found.above) != 1 or found.below != (Const(0.0),):
        return None
    return found.above[0]


__all__ = ["KEY", "LOG_SUM", "MOST_SINKS", "Rows", "free_of_map", "single", "totals_over"]
