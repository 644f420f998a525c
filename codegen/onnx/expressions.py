"""Index expressions as ONNX nodes.

Every expression becomes a value that broadcasts over the axes of the site (``b h i j`` for an attention
map), and each subexpression is written once for the whole model: sites with one mask over the same tensors
share its nodes.
"""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Callable, Hashable, Mapping, MutableMapping
from dataclasses import dataclass, field

import onnx_ir as ir

from attncompile.codegen.onnx.layouts import Operand
from attncompile.codegen.onnx.values import NUMPY_TYPES, Builder, dimensions
from attncompile.ir.evaluate import largest_first
from attncompile.ir.expr import Apply, Const, Expr, Index, Load, Score, Size, Total, Weight, symbols, walk
from attncompile.ir.operators import OPERATORS, Kind
from attncompile.ir.refusal import Refusal, RefusalError
from attncompile.ir.simplify import simplify
from attncompile.ir.types import TensorType

Shared = MutableMapping[Hashable, ir.Value]
"""What has been built already, by meaning; one for a model (its sites in graph order)."""


class Scopes:
    """What has been built, for a graph and each body inside it: a body sees what is around it, not the reverse."""

    def __init__(self, graph: ir.Graph) -> None:
        self._holder: dict[ir.Graph, ir.Graph | ir.Function | None] = {}
        for node in graph.all_nodes():
            for attribute in node.attributes.values():
                if attribute.type is ir.AttributeType.GRAPH:
                    self._holder[attribute.value] = node.graph
                elif attribute.type is ir.AttributeType.GRAPHS:
                    self._holder.update(dict.fromkeys(attribute.value, node.graph))
        self._found: dict[object, ChainMap[Hashable, ir.Value]] = {}

    def at(self, node: ir.Node) -> Shared:
        """What a new node in front of this one may read."""
        return self._of(node.graph)

    def is_body(self, node: ir.Node) -> bool:
        """Whether a node is in a body."""
        return node.graph in self._holder

    def _of(self, graph: ir.Graph | ir.Function | None) -> ChainMap[Hashable, ir.Value]:
        if graph not in self._found:
            inside = isinstance(graph, ir.Graph) and graph in self._holder
            outer = self._of(self._holder[graph]).maps if inside else []  # type: ignore[index]
            self._found[graph] = ChainMap({}, *outer)
        return self._found[graph]


@dataclass
class Writer:
    """Writes the expressions of one site.

    Attributes:
        build: collects the nodes.
        types: types of the Spec's tensors.
        operands: the graph's tensor for each of them that an expression or a size needs.
        axes: index names of the map, in order.
        extents: index name to the size of its axis.
        dtype: float dtype of the arithmetic.
        shared: nodes built for other sites of the model.
        score, weight: what ``s`` and ``w`` stand for, of the map's shape.
        total: what ``t`` stands for, with one column.
    """

    build: Builder
    types: Mapping[str, TensorType]
    operands: Mapping[str, Operand]
    axes: tuple[str, ...]
    extents: Mapping[str, Expr]
    dtype: str = "float32"
    shared: Shared = field(default_factory=dict)
    score: ir.Value | None = None
    weight: ir.Value | None = None
    total: ir.Value | None = None

    def key(self, expr: Expr) -> Hashable:
        """The meaning of the expression in this model, for sharing."""
        match expr:
            case Index(name):
                return ("index", self.axes.index(name), len(self.axes), self.key(self.extents[name]))
            case Size(name):
                value, axis, factor = self._size_source(name)
                sizes = dimensions(value)
                known = sizes[axis] if sizes is not None else None
                return ("size", known, factor) if known is not None else ("size of", value.name, axis, factor)
            case Load(name, indices, _):
                extents = tuple(self.key(size) for size in self.types[name].sizes)
                return (
                    "load",
                    self.operands[name].value.name,
                    extents,
                    tuple(self.key(index) for index in indices),
                )
            case Apply(operator, arguments, _):
                return (operator, self.dtype, tuple(self.key(argument) for argument in arguments))
            case Score():
                return ("score", id(self.score))
            case Weight():
                return ("weight", id(self.weight))
            case Total():
                return ("total", id(self.total))
            case Const(value):
                return ("constant", type(value).__name__, repr(value), self.dtype)
        raise ValueError(f"cannot write {expr!r} in ONNX")

    def once(self, key: Hashable, make: Callable[[], ir.Value]) -> ir.Value:
        """What ``make`` builds, or what was built under this key before."""
        if key not in self.shared:
            self.shared[key] = make()
        return self.shared[key]

    def write(self, expr: Expr) -> ir.Value:
        """The expression's value; it broadcasts against the map.

        Raises:
            RefusalError: when an operator has no ONNX form.
        """
        return self.once(self.key(expr), lambda: self._write(expr))

    def size(self, expr: Expr) -> ir.Value:
        """A size as an int64 tensor of shape ``[1]``."""
        expr = simplify(expr)
        if isinstance(expr, Const):
            return self.build.constant([expr.value])
        if isinstance(expr, Size):
            return self.once(("shape", self.key(expr)), lambda: self._read_size(expr.name))
        one = self.write(expr)
        return self.once(
            ("as [1]", self.key(expr)), lambda: self.build("Reshape", one, self.build.constant([1]))
        )

    def visible_axes(self, expr: Expr) -> frozenset[str]:
        """The index names that the expression's value depends on."""
        return frozenset(node.name for node in symbols(expr) if isinstance(node, Index))

    def _read_size(self, name: str) -> ir.Value:
        value, axis, factor = self._size_source(name)
        size = self.build("Shape", value, start=axis, end=axis + 1)
        return size if factor == 1 else self.build("Div", size, self.build.constant([factor]))

    def _size_source(self, name: str) -> tuple[ir.Value, int, int]:
        """A value, one of its axes, and the factor by which that axis is larger than the size.

        Raises:
            RefusalError: when no tensor has an axis from which the size can be told.
        """
        # captured tensors first: reading an operand's size may keep a copy of it alive
        for tensor, operand in sorted(self.operands.items(), key=lambda item: len(item[1].groups) > 2):
            sizes = {axis.name: axis.size for axis in self.types[tensor].axes}
            found = operand.behind_turn()
            for place, group in enumerate(found.groups):
                others = [simplify(sizes[axis]) for axis in group if sizes[axis] != Size(name)]
                numbers = [int(other.value) for other in others if isinstance(other, Const)]
                if len(others) == len(group) - 1 and len(numbers) == len(others):
                    return found.value, place, math.prod(numbers)
        raise RefusalError(Refusal("unknown-size", f"no tensor of the site tells the size {name}"))

    def _write(self, expr: Expr) -> ir.Value:
        match expr:
            case Const(value):
                return self._constant(value)
            case Size(_):
                return self.size(expr)
            case Index(name):
                return self._index(name)
            case Load():
                return self._load(expr)
            case Score():
                return _given(self.score, "score")
            case Weight():
                return _given(self.weight, "weight")
            case Total():
                return _given(self.total, "total")
            case Apply(operator, arguments, result):
                return self._apply(operator, arguments, result)
        raise ValueError(f"cannot write {expr!r} in ONNX")

    def _constant(self, value: bool | int | float) -> ir.Value:
        if isinstance(value, bool):
            return self.build.constant(value, "bool")
        return self.build.constant(value, "int64" if isinstance(value, int) else self.dtype)

    def _index(self, name: str) -> ir.Value:
        place, rank = self.axes.index(name), len(self.axes)
        length = self.build("Squeeze", self.size(self.extents[name]))
        run = self.build("Range", self.build.constant(0), length, self.build.constant(1))
        return self._axes_at(run, [place], rank)

    def _axes_at(self, value: ir.Value, places: list[int], rank: int) -> ir.Value:
        """A tensor whose axes are these places of the map, in order, with the missing ones added."""
        missing = [axis for axis in range(rank) if axis not in places]
        return self.build("Unsqueeze", value, self.build.constant(missing)) if missing else value

    def _load(self, load: Load) -> ir.Value:
        source, kind = self.operands[load.tensor].value, self.types[load.tensor]
        if not load.indices:
            return self._as_kind(source, kind.dtype, load.kind)
        direct = self._direct_load(source, load)
        if direct is not None:
            return self._as_kind(direct, kind.dtype, load.kind)
        zero, one = self.build.constant(0), self.build.constant(1)
        positions = []
        for index, extent in zip(load.indices, kind.sizes, strict=True):
            last = self.build("Sub", self.size(extent), one)
            positions.append(self.build("Max", self.build("Min", self.write(index), last), zero))
        joint = positions[0]
        for position in positions[1:]:
            joint = self.build("Add", joint, position)
        shape = self.build("Shape", joint)
        columns = [
            self.build("Unsqueeze", self.build("Expand", position, shape), self.build.constant([-1]))
            for position in positions
        ]
        return self._as_kind(
            self.build("GatherND", source, self.build("Concat", *columns, axis=-1)), kind.dtype, load.kind
        )

    def _direct_load(self, source: ir.Value, load: Load) -> ir.Value | None:
        """The tensor itself, its axes put where the map has them, when every index is an axis in full."""
        places: dict[int, int] = {}
        for axis, (index, extent) in enumerate(zip(load.indices, self.types[load.tensor].sizes, strict=True)):
            extent = simplify(extent)
            if isinstance(index, Index) and index.name in self.axes:
                place = self.axes.index(index.name)
                # an axis of size 1 is read at its one position: an index out of range is clamped
                if place in places.values() or (
                    extent != Const(1) and extent != simplify(self.extents[index.name])
                ):
                    return None
                places[axis] = place
            elif extent != Const(1):
                return None
        kept = sorted(places, key=lambda axis: places[axis])
        dropped = [axis for axis in range(len(load.indices)) if axis not in places]
        value = source
        if dropped:
            value = self.build("Squeeze", value, self.build.constant(dropped))
            kept = [axis - sum(gone < axis for gone in dropped) for axis in kept]
        if kept != sorted(kept):
            value = self.build("Transpose", value, perm=kept)
        return self._axes_at(value, sorted(places.values()), len(self.axes))

    def _as_kind(self, value: ir.Value, dtype: str, kind: Kind) -> ir.Value:
        wanted = {Kind.BOOL: "bool", Kind.INT: "int64", Kind.FLOAT: self.dtype}[kind]
        return value if dtype == wanted else self._cast(value, wanted)

    def _cast(self, value: ir.Value, dtype: str) -> ir.Value:
        return self.build("Cast", value, to=int(NUMPY_TYPES[dtype]))

    def _apply(self, operator: str, arguments: tuple[Expr, ...], result: Kind) -> ir.Value:
        arguments = largest_first(arguments) if operator == "add" else arguments
        values = [self.write(argument) for argument in arguments]
        kinds = [argument.kind for argument in arguments]
        if operator in ("float", "int"):
            # a cast to an integer truncates toward zero, in ONNX as here
            wanted = self.dtype if operator == "float" else "int64"
            already = kinds[0] is (Kind.FLOAT if operator == "float" else Kind.INT)
            return values[0] if already else self._cast(values[0], wanted)
        numbers = [n for n, kind in enumerate(kinds) if kind is not Kind.BOOL]
        if result is Kind.FLOAT or any(kinds[n] is Kind.FLOAT for n in numbers):
            values = [
                self._cast(value, self.dtype) if n in numbers and kinds[n] is Kind.INT else value
                for n, value in enumerate(values)
            ]
        if operator in COMPOSED:
            return COMPOSED[operator](self, *values)
        row = OPERATORS[operator]
        if not row.onnx:
            raise RefusalError(Refusal("no-onnx-form", f"the operator {operator!r} has no ONNX form"))
        if row.arity is not None or operator in ("min", "max"):
            return self.build(row.onnx, *values)
        made = values[0]
        for value in values[1:]:
            made = self.build(row.onnx, made, value)
        return made


def _given(value: ir.Value | None, what: str) -> ir.Value:
    if value is None:
        raise ValueError(f"the expression reads the {what}, which does not exist yet where it is written")
    return value


def _not_equal(writer: Writer, x: ir.Value, y: ir.Value) -> ir.Value:
    return writer.build("Not", writer.build("Equal", x, y))


def _floor_divide(writer: Writer, x: ir.Value, y: ir.Value) -> ir.Value:
    # ONNX divides integers toward zero; what is left of x without its (floor) remainder divides exactly
    return writer.build("Div", writer.build("Sub", x, writer.build("Mod", x, y)), y)


def _exp2(writer: Writer, x: ir.Value) -> ir.Value:
    return writer.build("Exp", writer.build("Mul", x, writer.build.constant(math.log(2), writer.dtype)))


def _log2(writer: Writer, x: ir.Value) -> ir.Value:
    return writer.build("Mul", writer.build("Log", x), writer.build.constant(1 / math.log(2), writer.dtype))


def _rsqrt(writer: Writer, x: ir.Value) -> ir.Value:
    return writer.build("Reciprocal", writer.build("Sqrt", x))


COMPOSED: dict[str, Callable[..., ir.Value]] = {
    "ne": _not_equal,
    "floordiv": _floor_divide,
    "exp2": _exp2,
    "log2": _log2,
    "rsqrt": _rsqrt,
}
"""Operators that take more than one ONNX node."""


def reads_score(expr: Expr) -> bool:
    """Whether the raw score occurs in the expression."""
    return any(isinstance(node, Score) for node in walk(expr))
