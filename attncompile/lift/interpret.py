"""Interpretation: the element of a graph value at symbolic indices, as an expression.

Walks back from a value through everything that is pointwise or moves data. What else it meets becomes a load
of that value, unless the value depends on the thing being interpreted (the score, the weights): then it is
refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from attncompile.frontends.graph import (
    Cast,
    Concatenate,
    CumulativeSum,
    Fill,
    Graph,
    Indices,
    Iota,
    Kept,
    Move,
    Node,
    Pointwise,
    Reduce,
    Select,
    Write,
)
from attncompile.ir import Expr, Index, Kind, Load, Refusal, RefusalError, Size, simplify
from attncompile.ir.expr import Apply, Const, apply, symbols, walk, where
from attncompile.ir.operators import OPERATORS
from attncompile.ir.simplify import Simplifier
from attncompile.ir.types import concrete, element_kind
from attncompile.lift.constants import progression
from attncompile.lift.cover import covers

_ARITHMETIC = ("add", "mul", "min", "max", "abs", "floor", "ceil", "round", "where", "float", "int", "floordiv", "mod")
EXACT = frozenset([*_ARITHMETIC, "eq", "ne", "lt", "le", "gt", "ge", "and", "or", "not"])
"""Operators whose results on small integers are exact in floating point."""

LARGEST = 400
"""Nodes of an expression beyond which a captured value is loaded as a whole instead of being computed in
place.
"""


@dataclass(frozen=True)
class Stop:
    """A value at which interpretation ends with a symbol.

    ``indices`` collects the index tuples it was reached at; a value that stands for one symbol must be
    reached at one.
    """

    symbol: Expr
    indices: list[Indices] = field(default_factory=list)


@dataclass
class Interpreter:
    """Interprets values of one graph.

    Attributes:
        graph: the graph.
        stops: values that end the walk with a symbol.
        dependent: values that must be interpreted down to a stop; they can not be loaded.
        extents: sizes of the index symbols.
        loaded: values that are loaded without looking at what makes them.
        reduced: sums and maxima of dependent values that were loaded: the graph has to compute them first.
    """

    graph: Graph
    stops: Mapping[str, Stop] = field(default_factory=dict)
    dependent: frozenset[str] = frozenset()
    extents: Mapping[str, Expr] = field(default_factory=dict)
    loaded: frozenset[str] = frozenset()
    simplifier: Simplifier = field(init=False)
    reduced: set[str] = field(init=False, default_factory=set)

    def __post_init__(self) -> None:
        self.simplifier = self.graph.simplifier(self.extents)
        self._known: dict[tuple[str, Indices], Expr] = {}
        self._progressions: dict[str, tuple[int, ...] | None] = {}
        self._looked: set[str] = set()
        # what no stop lies behind is the same for every site of this shape: the layers of a model share their
        # masks
        shares = not self.loaded and all(stop in self.dependent for stop in self.stops)
        self._shared = self.graph.elements(self.extents) if shares else self._known

    def at(self, value: str, indices: Indices) -> Expr:
        """The element of a value.

        Raises:
            RefusalError: when a dependent value is made by something that is not pointwise.
        """
        indices = tuple(self.simplifier(index) for index in indices)
        known = self._known if value in self.dependent or value in self.stops else self._shared
        key = (value, indices)
        if key not in known:
            known[key] = self._at(value, indices)
        return known[key]

    def _at(self, value: str, indices: Indices) -> Expr:
        if value in self.stops:
            stop = self.stops[value]
            if indices not in stop.indices:
                stop.indices.append(indices)
            return stop.symbol
        node = self.graph.producer.get(value)
        if node is None or value in self.loaded:
            return self._load(value, indices)
        if value in self.dependent:
            if isinstance(node, Reduce):
                self.reduced.add(value)
                return self._load(value, indices)
            return self.simplifier(self._stated(node, indices))
        try:
            found = self.simplifier(self._stated(node, indices))
        except RefusalError:
            if not self.graph.is_native(value):
                raise
            return self._load(value, indices)
        hidden = self.graph.withheld
        withheld = hidden and any(isinstance(node, Size) and node.name in hidden for node in walk(found))
        if not self.graph.is_readable(value):
            return found
        if self._looked_up(found) or self._unravels(found, indices):
            self._looked.add(value)
            return self._load(value, indices)
        return self._load(value, indices) if withheld or sum(1 for _ in walk(found)) > LARGEST else found

    def _looked_up(self, expr: Expr) -> bool:
        """Whether a parameter is read at places that are themselves loaded along two axes.

        The model looks that up once, for all layers: T5's biases by buckets of distances, Swin's by an index of its
        table. Two loads for each pair of each layer took longer than all else.
        """
        parameters = (
            load
            for load in walk(expr)
            if isinstance(load, Load) and (given := self.graph.inputs.get(load.tensor)) and given.role == "parameter"
        )
        places = (node for load in parameters for index in load.indices for node in walk(index))
        return any(isinstance(node, Load) and sum(isinstance(s, Index) for s in symbols(node)) > 1 for node in places)

    def _unravels(self, expr: Expr, indices: Indices) -> bool:
        """Whether an element of a view of what was looked up needs no arithmetic, where what it views does."""
        if not (isinstance(expr, Load) and expr.tensor in self._looked):
            return False
        return any(isinstance(each, Apply) for each in expr.indices) and not any(isinstance(i, Apply) for i in indices)

    def _load(self, value: str, indices: Indices) -> Expr:
        info = self.graph.infos[value]
        if not self.graph.is_readable(value):
            native = self.graph.describe(value)
            raise RefusalError(
                Refusal(
                    "overwritten",
                    f"{native.name} is read before something changes it in place",
                    native.name,
                    native.source,
                    "write the change as a new tensor",
                )
            )
        given = self.graph.inputs.get(value)
        kind = element_kind(info.dtype)
        if given is not None and given.value is not None and given.value.numel() == 1:
            item = given.value.item()
            return Const(bool(item) if kind is Kind.BOOL else int(item) if kind is Kind.INT else float(item))
        if given is not None and given.value is not None and given.role == "constant":
            if value not in self._progressions:
                self._progressions[value] = progression(given.value)
            steps = self._progressions[value]
            if steps is not None:
                start, *slopes = steps
                if kind is Kind.BOOL:
                    return Const(bool(start))
                return self.simplifier(sum((Const(n) * i for n, i in zip(slopes, indices, strict=True)), Const(start)))
        return Load(value, indices, kind)

    def _stated(self, node: Node, indices: Indices) -> Expr:
        match node:
            case Pointwise(_, operator, operands):
                return self._pointwise(node, operator, operands, indices)
            case Cast(_, source, dtype):
                return self._cast(node, self.at(source, indices), element_kind(dtype))
            case Move(_, source, index_map, _):
                return self.at(source, index_map(indices))
            case Concatenate(_, parts, axis):
                return self._concatenated(parts, axis, indices)
            case Select(_, data, positions, wraps):
                return self._selected(data, positions, wraps, indices)
            case Write():
                return self._written(node, indices)
            case CumulativeSum():
                return self._accumulated(node, indices)
            case Iota(_, start, step):
                return apply("add", start, apply("mul", step, indices[0]))
            case Fill(_, value):
                return value
        raise self._uninterpreted(node)

    def _uninterpreted(self, node: Node) -> RefusalError:
        native = self.graph.describe(node.output)
        return RefusalError(
            Refusal(
                "uninterpreted-node",
                f"{native.what} is not a pointwise operation or a movement of data",
                native.name,
                native.source,
                "attention is lifted through pointwise operations, views, slices, concatenations and gathers",
            )
        )

    def _accumulated(self, node: CumulativeSum, indices: Indices) -> Expr:
        """A sum over the positions up to one, where all of them have the same integer.

        Packed sequences are numbered so: by how many positions do not continue the one before them, of which there
        are none where positions are counted up.

        Raises:
            RefusalError: where the integers differ, or may do.
        """
        size = self.graph.infos[node.source].shape[node.axis]
        over = next((Index(name) for name, extent in self.extents.items() if extent == size), None)
        kind = element_kind(self.graph.infos[node.output].dtype)
        if over is None or kind is not Kind.INT:
            raise self._uninterpreted(node)
        # any position, under a name of which the range is known; the other indices may not speak of it
        others = [index for axis, index in enumerate(indices) if axis != node.axis]
        if any(over in symbols(index) for index in others):
            raise self._uninterpreted(node)
        each = self.at(node.source, (*indices[: node.axis], over, *indices[node.axis + 1 :]))
        if each.kind is Kind.FLOAT or over in symbols(each):
            raise self._uninterpreted(node)
        before = indices[node.axis]
        count = size - before - 1 if node.reverse else before
        return apply("mul", _as_kind(each, Kind.INT), simplify(count if node.exclusive else count + 1))

    def _cast(self, node: Node, value: Expr, kind: Kind) -> Expr:
        """A value in another kind.

        A number that is rounded to an integer must be exact: the logarithm in the buckets of relative positions, in
        another order of its factors or another precision, lands in another bucket.

        Raises:
            RefusalError: when rounding decides; the value is then loaded as the graph computes it.
        """
        inexact = [part for part in walk(value) if isinstance(part, Apply) and part.operator not in EXACT]
        if kind is Kind.INT and value.kind is Kind.FLOAT and inexact:
            native = self.graph.describe(node.output)
            raise RefusalError(
                Refusal(
                    "rounded",
                    f"an integer is made of {inexact[0].operator}(…), whose rounding would decide",
                    native.name,
                    native.source,
                    "compute integers by integer arithmetic",
                )
            )
        return _as_kind(value, kind)

    def _pointwise(
        self, node: Pointwise, operator: str, operands: tuple[str | Expr, ...], indices: Indices
    ) -> Expr:
        values: list[Expr] = []
        rank = len(indices)
        for operand in operands:
            if isinstance(operand, Expr):
                values.append(operand)
                continue
            shape = self.graph.infos[operand].shape
            target = self.graph.infos[node.output].shape
            offset = rank - len(shape)
            values.append(
                self.at(
                    operand,
                    tuple(
                        Const(0) if self._repeats(size, target[axis + offset]) else indices[axis + offset]
                        for axis, size in enumerate(shape)
                    ),
                )
            )
        return _typed(operator, values, element_kind(self.graph.infos[node.output].dtype))

    def _repeats(self, size: Expr, target: Expr) -> bool:
        """Whether an axis is repeated to another size: its own is 1, or was (``1 − max(0, 1 − S)``) in the example."""
        if Const(1) in (size, target) or size == target:
            return size == Const(1) != target
        names = {node.name for expr in (size, target) for node in walk(expr) if isinstance(node, Size)}
        hints = self.graph.size_hints
        return names <= set(hints) and concrete(size, hints) == 1 != concrete(target, hints)

    def _concatenated(self, parts: tuple[str, ...], axis: int, indices: Indices) -> Expr:
        begin: Expr = Const(0)
        ends: list[tuple[Expr, str, Expr]] = []
        for part in parts:
            end = simplify(begin + self.graph.infos[part].shape[axis])
            ends.append((begin, part, end))
            begin = end

        def piece(start: Expr, part: str) -> Expr:
            return self.at(part, (*indices[:axis], simplify(indices[axis] - start), *indices[axis + 1 :]))

        inside = [
            (start, part, self.simplifier(indices[axis] < end), self.simplifier(indices[axis] >= start))
            for start, part, end in ends
        ]
        possible = [entry for entry in inside if Const(False) not in entry[2:]]
        result = piece(possible[-1][0], possible[-1][1])
        for start, part, before_end, _ in reversed(possible[:-1]):
            chosen = piece(start, part)
            result = _typed("where", [before_end, chosen, result], None)
        return result

    def _written(self, node: Write, indices: Indices) -> Expr:
        """An element after one or more writes, the last of which that reached it counts.

        What nothing writes over is read only where some element may have been left out: before a buffer has been
        filled, there is nothing to read.
        """
        writes: list[tuple[Indices, str, Indices]] = []
        value = node.output
        while isinstance(made := self.graph.producer.get(value), Write | Kept) and value not in self.stops:
            if isinstance(made, Kept):
                value = made.source
                continue
            inside, place = made.place(indices)
            conditions = tuple(c for c in map(self.simplifier, inside) if c != Const(True))
            if Const(False) not in conditions:
                writes.append((conditions, made.written, place))
                if not conditions:
                    break
            value = made.before
        else:
            if not writes or not covers(self.simplifier, [conditions for conditions, _, _ in writes]):
                writes.append(((), value, indices))
        result = self.at(*writes[-1][1:])
        for conditions, written, target in reversed(writes[:-1]):
            result = _typed("where", [apply("and", *conditions), self.at(written, target), result], None)
        return result

    def _selected(self, data: str, positions: tuple, wraps: bool, indices: Indices) -> Expr:
        found: list[Expr] = []
        for (tensor, index_map), size in zip(positions, self.graph.infos[data].shape, strict=True):
            if tensor is None:
                found.append(index_map(indices)[0])
                continue
            position = self.at(tensor, index_map(indices))
            if wraps and not self._never_negative(position):
                position = where(position < 0, position + size, position)
            found.append(position)
        return self.at(data, tuple(found))

    def _never_negative(self, position: Expr) -> bool:
        """Whether a position counts from the start: by arithmetic, or because a constant table says so."""
        given = self.graph.inputs.get(position.tensor) if isinstance(position, Load) else None
        if given is not None and given.role in ("buffer", "constant") and given.value is not None:
            return given.value.numel() > 0 and int(given.value.min()) >= 0
        return self.simplifier.nonnegative(position)


def _as_kind(value: Expr, kind: Kind) -> Expr:
    if value.kind is kind:
        return value
    if kind is Kind.BOOL:
        return apply("ne", value, Const(0) if value.kind is Kind.INT else Const(0.0))
    return apply("float" if kind is Kind.FLOAT else "int", value)


def _typed(operator: str, values: list[Expr], kind: Kind | None) -> Expr:
    """Apply an operator as tensor libraries do: truth values count as numbers where numbers are asked for."""
    row = OPERATORS[operator]
    if operator == "where" and values[0].kind is not Kind.BOOL:
        values = [_as_kind(values[0], Kind.BOOL), *values[1:]]
    if row.result([v.kind for v in values]) is None:
        to = (
            kind
            if kind in (Kind.INT, Kind.FLOAT)
            else (Kind.FLOAT if any(v.kind is Kind.FLOAT for v in values) else Kind.INT)
        )
        first = values[:1] if operator == "where" else []
        values = [*first, *(_as_kind(v, to) if v.kind is Kind.BOOL else v for v in values[len(first) :])]
    if operator == "div" and kind is Kind.INT:
        operator = "floordiv"
    return apply(operator, *values)
