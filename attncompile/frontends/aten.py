"""The Graph view of a pre-dispatch ATen graph (from ``torch.export`` or from Dynamo): one row per native
operation.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import sympy
import torch

from attncompile.frontends import movement
from attncompile.frontends.capture import Captured, module_path, module_type, source_line
from attncompile.frontends.graph import (
    Cast,
    Concatenate,
    Contract,
    Fill,
    FusedAttention,
    Graph,
    GraphInput,
    Indices,
    Info,
    Iota,
    Linear,
    Move,
    NativeNode,
    Node,
    Opaque,
    Pointwise,
    Reduce,
    RefusedAttention,
    Select,
    Softmax,
)
from attncompile.frontends.memory import BETWEEN, EARLY, Versions, memory_versions, written_arguments
from attncompile.frontends.torch_internals import is_symbolic, size_hint
from attncompile.ir import Expr, Size, simplify
from attncompile.ir.expr import ONE, ZERO, Const, Index, apply, substitute
from attncompile.ir.simplify import Simplifier
from attncompile.ir.types import NAMES, concrete


def size_expr(size: int | torch.SymInt) -> Expr:
    """A torch size as an expression; a symbol ``s53`` becomes the size ``S53``."""
    return _from_sympy(size.node.expr) if isinstance(size, torch.SymInt) else Const(int(size))


def _from_sympy(expr: Any) -> Expr:
    if isinstance(expr, sympy.Symbol):
        name = str(expr)
        return Size(name[0].upper() + name[1:])
    if isinstance(expr, sympy.Integer) or (isinstance(expr, sympy.Number) and int(expr) == expr):
        return Const(int(expr))
    parts = [_from_sympy(part) for part in expr.args]
    if isinstance(expr, sympy.Add):
        return simplify(apply("add", *parts))
    if isinstance(expr, sympy.Mul):
        return simplify(apply("mul", *parts))
    if isinstance(expr, sympy.Pow) and isinstance(parts[1], Const):
        return simplify(apply("mul", *[parts[0]] * int(parts[1].value), 1))
    names = {
        "FloorDiv": "floordiv",
        "CleanDiv": "floordiv",
        "IntTrueDiv": "floordiv",
        "Mod": "mod",
        "PythonMod": "mod",
        "Max": "max",
        "Min": "min",
    }
    found = names.get(type(expr).__name__)
    if found is None:
        raise ValueError(f"cannot state the size {expr} ({type(expr).__name__}) as an index expression")
    return simplify(apply(found, *parts))


@dataclass
class _Builder:
    """Collects the nodes that one native node is stated as."""

    infos: dict[str, Info]
    node: torch.fx.Node
    versions: Versions
    equal: dict[Expr, Expr]
    producer: Mapping[str, Node]
    made: list[Node] = field(default_factory=list)

    def name(self) -> str:
        return f"{self.node.name}#{len(self.made)}"

    def value(self, node: torch.fx.Node, reader: torch.fx.Node | None = None) -> str:
        """The value that a node stands for when the reader (this node by default) reads it."""
        return self.versions.reads[(reader or self.node).name].get(node.name, node.name)

    def equate(self, one: Expr, other: Expr) -> None:
        """Note that two sizes must agree, or the operation would fail."""
        if one != other and (isinstance(one, Size) or isinstance(other, Size)):
            symbol, stays = (other, one) if isinstance(other, Size) else (one, other)
            self.equal.setdefault(symbol, stays)

    def size(self, size: int | torch.SymInt) -> Expr:
        """A torch size as an expression, one symbol for sizes that must agree."""
        return _unified(size_expr(size), self.equal)

    def emit(self, node: Node, info: Info) -> str:
        self.made.append(node)
        self.infos[node.output] = info
        return node.output

    def info(self, value: str) -> Info:
        return self.infos[value]

    def shape(self, value: str) -> Indices:
        return self.infos[value].shape

    @property
    def out(self) -> Info:
        return self.infos[self.node.name]

    def operand(self, argument: Any) -> str | Expr:
        """A tensor argument by name, a number or symbol as a constant expression."""
        if isinstance(argument, torch.fx.Node):
            value = argument.meta.get("val")
            return self.value(argument) if isinstance(value, torch.Tensor) else self.number(argument)
        return self.number(argument)

    def number(self, argument: Any) -> Expr:
        """A Python number, or a node that stands for a symbolic one."""
        if isinstance(argument, torch.fx.Node):
            argument = argument.meta["val"]
        if is_symbolic(argument):
            if not isinstance(argument, torch.SymInt):
                raise _Unstated
            return self.size(argument)
        if isinstance(argument, bool | int | float):
            return Const(argument)
        raise _Unstated

    def tensor(self, argument: Any) -> str:
        found = self.operand(argument)
        if not isinstance(found, str):
            raise _Unstated
        return found

    def pointwise(self, operation: str, *operands: str | Expr, dtype: str | None = None) -> str:
        shapes = [self.shape(o) for o in operands if isinstance(o, str)]
        shape = broadcast_shapes(shapes)
        return self.emit(Pointwise(self.name(), operation, operands), Info(shape, dtype or self.out.dtype))

    def move(self, source: str, index_map: Callable[[Indices], Indices], what: str, shape: Indices) -> str:
        return self.emit(Move(self.name(), source, index_map, what), Info(shape, self.info(source).dtype))

    def index_along(self, axis: int, shape: Indices) -> str:
        """The position along one axis of a shape, as an integer tensor of that shape."""
        iota = self.emit(Iota(self.name(), ZERO, ONE), Info((shape[axis],), "int64"))
        return self.move(iota, lambda indices: (indices[axis],), "iota", shape)


def _unified(size: Expr, equal: Mapping[Expr, Expr]) -> Expr:
    return simplify(substitute(size, dict(equal))) if equal else size


class _Unstated(Exception):
    """This use of the operation has no row; the node stays opaque."""


def broadcast_shapes(shapes: Sequence[Indices]) -> Indices:
    """The broadcast of shapes; of two sizes that are not the constant 1, the first is taken."""
    rank = max((len(shape) for shape in shapes), default=0)
    result: list[Expr] = []
    for axis in range(rank):
        sizes = [shape[axis - rank + len(shape)] for shape in shapes if axis - rank + len(shape) >= 0]
        larger = [size for size in sizes if size != ONE]
        # a constant is the safer statement of two sizes that must agree
        fixed = [size for size in larger if isinstance(size, Const)]
        result.append((fixed or larger or [ONE])[0])
    return tuple(result)


def _axis(number: int, rank: int) -> int:
    return number % rank if rank else 0


Row = Callable[[_Builder, list[Any], dict[str, Any]], str]


def _plain(operation: str) -> Row:
    """A pointwise operation whose arguments are its operands."""

    def row(b: _Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
        return b.pointwise(operation, *(b.operand(a) for a in args))

    return row


def _add(sign: int) -> Row:
    def row(b: _Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
        left, right = b.operand(args[0]), b.operand(args[1])
        factor = b.number(kwargs.get("alpha", args[2] if len(args) > 2 else 1))
        weight = simplify(apply("mul", sign, factor))
        if weight != ONE:
            right = (
                b.pointwise("mul", weight, right)
                if isinstance(right, str)
                else simplify(apply("mul", weight, right))
            )
        return b.pointwise("add", left, right)

    return row


def _reverse_subtract(b: _Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    return _add(-1)(b, [args[1], args[0], *args[2:]], kwargs)


def _divide(b: _Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    mode = kwargs.get("rounding_mode")
    left, right = b.operand(args[0]), b.operand(args[1])
    if mode is None:
        return b.pointwise("div", left, right)
    if mode != "floor" or not b.out.dtype.startswith("int"):
        raise _Unstated
    return b.pointwise("floordiv", left, right)


def _integer(operation: str) -> Row:
    """An operation that the language has for integers only."""

    def row(b: _Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
        if not b.out.dtype.startswith("int"):
            raise _Unstated
        return b.pointwise(operation, *(b.operand(a) for a in args))

    return row


def _truth(operation: str) -> Row:
    """Bitwise operations of truth values; of integers they stay opaque."""

    def row(b: _Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
        if b.out.dtype != "bool":
            raise _Unstated
        operands = [b.operand(a) for a in args]
        asked = [
            o
            if (b.info(o).dtype == "bool" if isinstance(o, str) else o.kind.value == "bool")
            else b.pointwise("ne", o, ZERO, dtype="bool")
            for o in operands
        ]
        return b.pointwise(operation, *asked)

    return row


def _masked_fill(b: _Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    return b.pointwise("where", b.operand(args[1]), b.operand(args[2]), b.operand(args[0]))


def _clamp(b: _Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    low = kwargs.get("min", args[1] if len(args) > 1 else None)
    high = kwargs.get("max", args[2] if len(args) > 2 else None)
    value = b.tensor(args[0])
    if low is not None:
        value = b.pointwise("max", value, b.operand(low))
    if high is not None:
        value = b.pointwise("min", value, b.operand(high))
    return value


def _negate(b: _Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    return b.pointwise("mul", Const(-1), b.tensor(args[0]))


def _reciprocal(b: _Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    return b.pointwise("div", Const(1.0), b.tensor(args[0]))


def _convert(b: _Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    source = b.tensor(args[0])
    if b.info(source).dtype == b.out.dtype:
        return b.move(source, movement.identity, "same", b.shape(source))
    return b.emit(Cast(b.name(), source, b.out.dtype), b.out)


def _same(b: _Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    source = b.tensor(args[0])
    return b.move(source, movement.identity, "same", b.shape(source))


def _dropout(b: _Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    probability, training = args[1], args[2]
    if training and probability:
        raise _Unstated
    return _same(b, args, kwargs)


def _fill(b: _Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    name = str(b.node.target)
    if "full" in name:
        value = b.number(args[-1] if "full_like" not in name else args[1])
    elif "scalar_tensor" in name:
        value = b.number(args[0])
    else:
        value = Const(1 if "ones" in name else 0)
    return b.emit(Fill(b.name(), _as_dtype(value, b.out.dtype)), b.out)


def _arange(b: _Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    numbers = [b.number(a) for a in args]
    start: Expr = ZERO
    step: Expr = ONE
    if len(numbers) >= 2:
        start = numbers[0]
    if len(numbers) >= 3:
        step = numbers[2]
    if start.kind.value != "int" or step.kind.value != "int":
        raise _Unstated
    made = b.emit(Iota(b.name(), start, step), Info(b.out.shape, "int64"))
    return made if b.out.dtype == "int64" else b.emit(Cast(b.name(), made, b.out.dtype), b.out)


def _triangle(keep_lower: bool) -> Row:
    def row(b: _Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
        source = b.tensor(args[0])
        diagonal = b.number(kwargs.get("diagonal", args[1] if len(args) > 1 else 0))
        shape = b.shape(source)
        rows, columns = b.index_along(len(shape) - 2, shape), b.index_along(len(shape) - 1, shape)
        edge = b.pointwise("add", rows, diagonal, dtype="int64")
        kept = b.pointwise("le" if keep_lower else "ge", columns, edge, dtype="bool")
        zero = (
            Const(False)
            if b.out.dtype == "bool"
            else Const(0)
            if b.out.dtype.startswith("int")
            else Const(0.0)
        )
        return b.pointwise("where", kept, source, zero)

    return row


def _view(b: _Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    source = b.tensor(args[0])
    return b.move(source, movement.reshape(b.shape(source), b.out.shape), "reshape", b.out.shape)


def _expand(b: _Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    source = b.tensor(args[0])
    return b.move(source, movement.broadcast(b.shape(source), b.out.shape), "expand", b.out.shape)


def _transpose(b: _Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    source = b.tensor(args[0])
    rank = len(b.shape(source))
    order = list(range(rank))
    if rank >= 2:
        first, second = (_axis(a, rank) for a in (args[1:3] if len(args) > 2 else (rank - 2, rank - 1)))
        order[first], order[second] = order[second], order[first]
    return b.move(source, movement.permute(order), "permute", b.out.shape)


def _permute(b: _Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    source = b.tensor(args[0])
    rank = len(b.shape(source))
    return b.move(source, movement.permute([_axis(a, rank) for a in args[1]]), "permute", b.out.shape)


def _movedim(b: _Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    source = b.tensor(args[0])
    rank = len(b.shape(source))
    moved, targets = ([a] if isinstance(a, int) else list(a) for a in args[1:3])
    placed = {_axis(t, rank): _axis(m, rank) for m, t in zip(moved, targets, strict=True)}
    rest = iter(axis for axis in range(rank) if axis not in placed.values())
    order = [placed[axis] if axis in placed else next(rest) for axis in range(rank)]
    return b.move(source, movement.permute(order), "permute", b.out.shape)


def _unsqueeze(b: _Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    source = b.tensor(args[0])
    return b.move(source, movement.unsqueeze([_axis(args[1], len(b.out.shape))]), "unsqueeze", b.out.shape)


def _squeeze(b: _Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    source = b.tensor(args[0])
    shape = b.shape(source)
    asked = range(len(shape)) if len(args) < 2 else [args[1]] if isinstance(args[1], int) else args[1]
    axes = [_axis(a, len(shape)) for a in asked if shape[_axis(a, len(shape))] == ONE]
    return b.move(source, movement.squeeze(axes), "squeeze", b.out.shape)


def _position(b: _Builder, argument: Any, size: Expr) -> Expr:
    """A start or index, counted from the end when negative."""
    number = b.number(0 if argument is None else argument)
    if isinstance(number, Const):
        return simplify(size + number) if number.value < 0 else number
    return number


def _slice(b: _Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    source = b.tensor(args[0])
    shape = b.shape(source)
    axis = _axis(args[1] if len(args) > 1 else 0, len(shape))
    size, end, step = shape[axis], args[3] if len(args) > 3 else None, args[4] if len(args) > 4 else 1
    start = _position(b, args[2] if len(args) > 2 else 0, size)
    if step == 1 and (end is None or (isinstance(end, int) and end >= _NO_END)):
        start = simplify(
            size - b.out.shape[axis]
        )  # what is left says where it began, with torch's own clamping
    elif not isinstance(start, Const) or not isinstance(size, Const):
        start = start if Simplifier({}).nonnegative(start) else simplify(apply("max", start, ZERO))
    else:
        start = Const(min(max(start.value, 0), size.value))
    return b.move(source, movement.slices(axis, start, step), "slice", b.out.shape)


_NO_END = 2**63 - 1
"""The end of a slice that has none."""


def _narrow(b: _Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    source = b.tensor(args[0])
    axis = _axis(args[1], len(b.shape(source)))
    start = _position(b, args[2], b.shape(source)[axis])
    return b.move(source, movement.slices(axis, start, 1), "slice", b.out.shape)


def _select(b: _Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    source = b.tensor(args[0])
    shape = b.shape(source)
    axis = _axis(args[1], len(shape))
    return b.move(source, movement.select(axis, _position(b, args[2], shape[axis])), "select", b.out.shape)


def _flip(b: _Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    source = b.tensor(args[0])
    shape = b.shape(source)
    return b.move(source, movement.flip([_axis(a, len(shape)) for a in args[1]], shape), "flip", shape)


def _repeat(b: _Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    source = b.tensor(args[0])
    shape = b.shape(source)
    offset = len(b.out.shape) - len(shape)

    def index_map(indices: Indices) -> Indices:
        return tuple(apply("mod", indices[axis + offset], size) for axis, size in enumerate(shape))

    return b.move(source, index_map, "repeat", b.out.shape)


def _repeat_interleave(b: _Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    source = b.tensor(args[0])
    repeats = b.number(args[1])
    dim = kwargs.get("dim", args[2] if len(args) > 2 else None)
    if dim is None:
        raise _Unstated
    axis = _axis(dim, len(b.shape(source)))

    def index_map(indices: Indices) -> Indices:
        return (*indices[:axis], apply("floordiv", indices[axis], repeats), *indices[axis + 1 :])

    return b.move(source, index_map, "repeat", b.out.shape)


def _concatenate(b: _Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    parts = tuple(b.tensor(part) for part in args[0])
    axis = _axis(args[1] if len(args) > 1 else kwargs.get("dim", 0), len(b.out.shape))
    if any(len(b.shape(part)) != len(b.out.shape) for part in parts):
        raise _Unstated
    return b.emit(Concatenate(b.name(), parts, axis), b.out)


def _stack(b: _Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    axis = _axis(args[1] if len(args) > 1 else 0, len(b.out.shape))
    shape = (*b.out.shape[:axis], ONE, *b.out.shape[axis + 1 :])
    parts = tuple(b.move(b.tensor(p), movement.unsqueeze([axis]), "unsqueeze", shape) for p in args[0])
    return b.emit(Concatenate(b.name(), parts, axis), b.out)


def _part(b: _Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    """One result of a split, chunk or unbind."""
    whole, number = args
    if not isinstance(whole, torch.fx.Node) or not isinstance(whole.args[0], torch.fx.Node):
        raise _Unstated
    kind = str(whole.target)
    source = b.value(whole.args[0], whole)
    rank = len(b.shape(source))
    further: list[Any] = list(whole.args[1:])
    parts = whole.meta["val"]
    if kind.startswith("aten.max.dim") and number == 0:
        return b.emit(
            Reduce(b.name(), source, "max", (_axis(further[0], rank),), bool(further[1:] and further[1])),
            b.out,
        )
    if "unbind" in kind:
        axis = _axis(further[0] if further else 0, rank)
        return b.move(source, movement.select(axis, Const(number)), "select", b.out.shape)
    if not any(name in kind for name in ("split", "chunk")):
        raise _Unstated
    dim: Any = further[1] if len(further) > 1 else whole.kwargs.get("dim", 0)
    axis = _axis(dim, rank)
    start: Expr = ZERO
    for part in parts[:number]:
        start = simplify(start + b.size(part.shape[axis]))
    return b.move(source, movement.slices(axis, start, 1), "slice", b.out.shape)


def _index(b: _Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    data, selectors = b.tensor(args[0]), list(args[1])
    shape = b.shape(data)
    selectors += [None] * (len(shape) - len(selectors))
    tensors = {axis: b.tensor(s) for axis, s in enumerate(selectors) if s is not None}
    if any(b.info(t).dtype == "bool" for t in tensors.values()) or not tensors:
        raise _Unstated
    axes = sorted(tensors)
    common = broadcast_shapes([b.shape(t) for t in tensors.values()])
    together = axes[-1] - axes[0] + 1 == len(axes)
    first = axes[0] if together else 0
    free = [axis for axis in range(len(shape)) if axis not in tensors]

    def free_axis(axis: int) -> Callable[[Indices], Indices]:
        place = free.index(axis)
        where = place if place < first else place + len(common)
        return lambda indices: (indices[where],)

    def chosen(tensor: str) -> Callable[[Indices], Indices]:
        inner = movement.broadcast(b.shape(tensor), common)
        return lambda indices: inner(indices[first : first + len(common)])

    positions = tuple(
        (tensors[axis], chosen(tensors[axis])) if axis in tensors else (None, free_axis(axis))
        for axis in range(len(shape))
    )
    return b.emit(Select(b.name(), data, positions), b.out)


def _along(
    b: _Builder,
    data: str,
    axis: int,
    index: str,
    index_map: Callable[[Indices], Indices],
    others: Callable[[int], int],
    wraps: bool,
) -> str:
    rank = len(b.shape(data))

    def keep(source_axis: int) -> Callable[[Indices], Indices]:
        where = others(source_axis)
        return lambda indices: (indices[where],)

    positions = tuple((index, index_map) if a == axis else (None, keep(a)) for a in range(rank))
    return b.emit(Select(b.name(), data, positions, wraps), b.out)


def _embedding(b: _Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    table, index = b.tensor(args[0]), b.tensor(args[1])
    rank = len(b.shape(index))
    return _along(b, table, 0, index, lambda indices: indices[:rank], lambda axis: rank + axis - 1, False)


def _index_select(b: _Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    data, axis, index = b.tensor(args[0]), _axis(args[1], len(b.out.shape)), b.tensor(args[2])
    return _along(b, data, axis, index, lambda indices: (indices[axis],), lambda a: a, False)


def _gather(b: _Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    data, axis, index = b.tensor(args[0]), _axis(args[1], len(b.out.shape)), b.tensor(args[2])
    return _along(b, data, axis, index, lambda indices: indices, lambda a: a, False)


def _labels(count: int, offset: int = 0) -> tuple[str, ...]:
    return tuple(f"batch{n + offset}" for n in range(count))


def contract_matmul(
    left: Indices, right: Indices
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Labels of NumPy's ``matmul``, whose batch axes broadcast right-aligned."""
    if len(left) < 2 or len(right) < 2:
        raise _Unstated
    batch = max(len(left), len(right)) - 2
    return (
        (*_labels(len(left) - 2, batch - len(left) + 2), "row", "inner"),
        (*_labels(len(right) - 2, batch - len(right) + 2), "inner", "column"),
        (*_labels(batch), "row", "column"),
    )


def _matmul(b: _Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    left, right = b.tensor(args[0]), b.tensor(args[1])
    labels = contract_matmul(b.shape(left), b.shape(right))
    return b.emit(Contract(b.name(), left, right, *labels), b.out)


def _baddbmm(b: _Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    product = _matmul(b, args[1:3], {})
    scaled = b.pointwise("mul", b.number(kwargs.get("alpha", 1)), product)
    if kwargs.get("beta", 1) == 0:
        return scaled
    added = b.pointwise("mul", b.number(kwargs.get("beta", 1)), b.tensor(args[0]))
    return b.pointwise("add", scaled, added)


def _einsum(b: _Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    equation, tensors = args[0].replace(" ", ""), args[1]
    if len(tensors) != 2 or "." in equation:
        raise _Unstated
    left, right = b.tensor(tensors[0]), b.tensor(tensors[1])
    inputs, arrow, output = equation.partition("->")
    first, second = inputs.split(",")
    if not arrow:
        output = "".join(sorted(c for c in set(first + second) if (first + second).count(c) == 1))
    if len(set(first)) != len(first) or len(set(second)) != len(second):
        raise _Unstated
    return b.emit(Contract(b.name(), left, right, tuple(first), tuple(second), tuple(output)), b.out)


def _linear(b: _Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    bias = b.tensor(args[2]) if len(args) > 2 and args[2] is not None else None
    return b.emit(Linear(b.name(), b.tensor(args[0]), b.tensor(args[1]), bias), b.out)


def _addmm(b: _Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    if kwargs.get("alpha", 1) != 1 or kwargs.get("beta", 1) != 1:
        raise _Unstated
    return b.emit(Linear(b.name(), b.tensor(args[1]), b.tensor(args[2]), b.tensor(args[0]), True), b.out)


def _softmax(b: _Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    return b.emit(Softmax(b.name(), b.tensor(args[0]), _axis(args[1], len(b.out.shape))), b.out)


def _log_softmax(b: _Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    weights = b.emit(Softmax(b.name(), b.tensor(args[0]), _axis(args[1], len(b.out.shape))), b.out)
    return b.pointwise("log", weights)


def _reduce(kind: Literal["sum", "max"]) -> Row:
    def row(b: _Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
        source = b.tensor(args[0])
        rank = len(b.shape(source))
        asked = args[1] if len(args) > 1 else kwargs.get("dim")
        if b.out.dtype == "bool" or (
            kind == "sum" and not b.info(source).dtype.startswith(("float", "bfloat"))
        ):
            raise _Unstated
        axes = range(rank) if asked is None or asked == [] else [asked] if isinstance(asked, int) else asked
        keeps = bool(args[2] if len(args) > 2 else kwargs.get("keepdim", False))
        summed = tuple(sorted(_axis(a, rank) for a in axes))
        factors = _factors(b, source) if kind == "sum" and len(summed) == 1 else None
        if factors is None:
            return b.emit(Reduce(b.name(), source, kind, summed, keeps), b.out)
        labels = tuple(f"axis{n}" for n in range(rank))
        kept = labels[: summed[0]] + labels[summed[0] + 1 :]
        shape = b.shape(source)
        left, right = factors
        product = b.emit(
            Contract(
                b.name(),
                left,
                right,
                labels[rank - len(b.shape(left)) :],
                labels[rank - len(b.shape(right)) :],
                kept,
            ),
            Info((*shape[: summed[0]], *shape[summed[0] + 1 :]), b.out.dtype),
        )
        return b.move(product, movement.unsqueeze(summed), "unsqueeze", b.out.shape) if keeps else product

    return row


def _factors(b: _Builder, value: str) -> tuple[str, str] | None:
    """The two tensors whose outer product a value is: its sum over an axis is then a contraction.

    Each of the two lacks an axis; a product of equal shapes, or with a mask that only one side broadcasts, is
    none.
    """
    match b.producer.get(value):
        case Pointwise(_, "mul", (str(left), str(right))):
            shape = b.shape(value)
            lacking = [len(b.shape(f)) < len(shape) or ONE in b.shape(f) for f in (left, right)]
            return (
                (left, right)
                if all(lacking) and (b.shape(left) != shape or b.shape(right) != shape)
                else None
            )
    return None


def _relu(b: _Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    zero = Const(0.0) if b.out.dtype.startswith(("float", "bfloat")) else ZERO
    return b.pointwise("max", b.tensor(args[0]), zero)


def _replaced(b: _Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    """``x.copy_(y)`` and ``x.fill_(c)``: what ``x`` held is of no interest."""
    value = b.operand(args[1])
    if isinstance(value, Expr):
        return b.emit(Fill(b.name(), _as_dtype(value, b.out.dtype)), b.out)
    if b.info(value).dtype != b.out.dtype:
        value = b.emit(Cast(b.name(), value, b.out.dtype), Info(b.shape(value), b.out.dtype))
    return b.move(value, movement.broadcast(b.shape(value), b.out.shape), "copy", b.out.shape)


def _as_dtype(value: Expr, dtype: str) -> Expr:
    if not isinstance(value, Const):
        return value
    return Const({"bool": bool}.get(dtype, int if dtype.startswith(("int", "uint")) else float)(value.value))


def _zeroed(b: _Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    return b.emit(Fill(b.name(), _as_dtype(ZERO, b.out.dtype)), b.out)


def _scaled_dot_product(b: _Builder, args: list[Any], kwargs: dict[str, Any]) -> str:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    query, key, value = (b.tensor(given[n]) for n in names[:3])
    if given.get("dropout_p", 0.0):
        raise _Unstated("it drops weights at random, as in training")
    shapes = [b.shape(t) for t in (query, key, value)]
    rank = len(shapes[0])
    if rank < 3 or any(len(shape) != rank for shape in shapes) or (rank != 4 and given.get("enable_gqa")):
        raise _Unstated(f"its operands have ranks {[len(shape) for shape in shapes]}")
    b.equate(shapes[0][-1], shapes[1][-1])
    b.equate(shapes[1][-2], shapes[2][-2])
    channels, scale = shapes[0][-1], given.get("scale")
    if scale is None:
        if not isinstance(channels, Const):
            raise _Unstated(f"its scale depends on a symbolic number of channels, {channels}")
        scale = 1.0 / math.sqrt(channels.value)
    # all axes before the last two are batch-like: the first is b, the others together are h
    outer = (
        broadcast_shapes([shape[:-2] for shape in shapes]) if not given.get("enable_gqa") else shapes[0][:-2]
    )
    batch, inner = (outer[0], outer[1:])
    repeat = simplify(outer[1] // shapes[1][1]) if given.get("enable_gqa") else None
    heads: Expr = ONE
    for size in inner:
        heads = simplify(heads * size)

    def element(shape: Indices) -> Callable[[Indices], Indices]:
        grouped = repeat is not None and shape is not shapes[0]

        def index_map(indices: Indices) -> Indices:
            head = apply("floordiv", indices[1], repeat) if grouped and repeat is not None else indices[1]
            place = [indices[0], *_unravelled(head, inner)]
            return (
                *(
                    ZERO if size == ONE != outer[n] and not grouped else at
                    for n, (size, at) in enumerate(zip(shape[:-2], place, strict=True))
                ),
                *indices[2:],
            )

        return index_map

    mask = b.tensor(given["attn_mask"]) if given.get("attn_mask") is not None else None
    full = (*outer, shapes[0][-2], shapes[1][-2])

    def mask_element(indices: Indices) -> Indices:
        assert mask is not None
        return movement.broadcast(b.shape(mask), full)(
            (indices[0], *_unravelled(indices[1], inner), *indices[2:])
        )

    output = (Index("b"), *_unravelled(Index("h"), inner), Index("i"), Index("e"))
    return b.emit(
        FusedAttention(
            b.name(),
            query,
            key,
            value,
            element(shapes[0]),
            element(shapes[1]),
            element(shapes[2]),
            mask,
            mask_element if mask else None,
            Index("j") <= Index("i") if given.get("is_causal") else None,
            float(scale),
            (batch, heads, shapes[0][-2], shapes[1][-2], channels, shapes[2][-1]),
            (),
            b.out.dtype,
            output_indices=output,
        ),
        b.out,
    )


def _unravelled(position: Expr, sizes: Indices) -> list[Expr]:
    """The indices of a row-major position on axes of these sizes."""
    found: list[Expr] = []
    for size in reversed(sizes[1:]):
        found.append(simplify(apply("mod", position, size)))
        position = simplify(apply("floordiv", position, size))
    return [position, *reversed(found)] if sizes else []


_POINTWISE = {
    "mul": "mul",
    "exp": "exp",
    "exp2": "exp2",
    "log": "log",
    "log2": "log2",
    "tanh": "tanh",
    "sigmoid": "sigmoid",
    "sqrt": "sqrt",
    "rsqrt": "rsqrt",
    "abs": "abs",
    "pow": "pow",
    "minimum": "min",
    "maximum": "max",
    "where": "where",
    "lt": "lt",
    "le": "le",
    "gt": "gt",
    "ge": "ge",
    "eq": "eq",
    "ne": "ne",
    "sin": "sin",
    "cos": "cos",
    "erf": "erf",
    "floor": "floor",
    "ceil": "ceil",
    "round": "round",
    "true_divide": "div",
    "greater": "gt",
    "less": "lt",
    "greater_equal": "ge",
    "less_equal": "le",
    "not_equal": "ne",
    "multiply": "mul",
}

ROWS: dict[str, Row] = {
    **{name: _plain(operation) for name, operation in _POINTWISE.items()},
    "add": _add(1),
    "sub": _add(-1),
    "subtract": _add(-1),
    "rsub": _reverse_subtract,
    "div": _divide,
    "divide": _divide,
    "neg": _negate,
    "reciprocal": _reciprocal,
    "floor_divide": _integer("floordiv"),
    "remainder": _integer("mod"),
    "bitwise_and": _truth("and"),
    "__and__": _truth("and"),
    "logical_and": _truth("and"),
    "bitwise_or": _truth("or"),
    "__or__": _truth("or"),
    "logical_or": _truth("or"),
    "bitwise_not": _truth("not"),
    "logical_not": _truth("not"),
    "bitwise_xor": _truth("ne"),
    "__xor__": _truth("ne"),
    "logical_xor": _truth("ne"),
    "masked_fill": _masked_fill,
    "clamp": _clamp,
    "clamp_min": _clamp,
    "to": _convert,
    "_to_copy": _convert,
    "type_as": _convert,
    "alias": _same,
    "contiguous": _same,
    "clone": _same,
    "detach": _same,
    "detach_": _same,
    "lift_fresh_copy": _same,
    "lift_fresh": _same,
    "view_as": _view,
    "dropout": _dropout,
    "zeros": _fill,
    "ones": _fill,
    "full": _fill,
    "new_zeros": _fill,
    "new_ones": _fill,
    "new_full": _fill,
    "zeros_like": _fill,
    "ones_like": _fill,
    "full_like": _fill,
    "scalar_tensor": _fill,
    "arange": _arange,
    "tril": _triangle(True),
    "triu": _triangle(False),
    "view": _view,
    "reshape": _view,
    "_unsafe_view": _view,
    "flatten": _view,
    "unflatten": _view,
    "expand": _expand,
    "broadcast_to": _expand,
    "expand_as": _expand,
    "transpose": _transpose,
    "t": _transpose,
    "swapaxes": _transpose,
    "swapdims": _transpose,
    "numpy_T": _transpose,
    "mT": _transpose,
    "permute": _permute,
    "movedim": _movedim,
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    "slice": _slice,
    "narrow": _narrow,
    "select": _select,
    "flip": _flip,
    "repeat": _repeat,
    "repeat_interleave": _repeat_interleave,
    "cat": _concatenate,
    "concat": _concatenate,
    "stack": _stack,
    "getitem": _part,
    "index": _index,
    "embedding": _embedding,
    "index_select": _index_select,
    "gather": _gather,
    "matmul": _matmul,
    "bmm": _matmul,
    "mm": _matmul,
    "baddbmm": _baddbmm,
    "einsum": _einsum,
    "linear": _linear,
    "sum": _reduce("sum"),
    "amax": _reduce("max"),
    "relu": _relu,
    "copy": _replaced,
    "fill": _replaced,
    "zero": _zeroed,
    "log_softmax": _log_softmax,
    "addmm": _addmm,
    "softmax": _softmax,
    "_softmax": _softmax,
    "scaled_dot_product_attention": _scaled_dot_product,
}
"""ATen operation (without overload) to the statement of what it does."""


def _operation(target: Any) -> str:
    if target is operator.getitem:
        return "getitem"
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[-1]
    return getattr(target, "__name__", str(target))


def _info(value: torch.Tensor, equal: Mapping[Expr, Expr]) -> Info:
    return Info(
        tuple(_unified(size_expr(size), equal) for size in value.shape), NAMES.get(value.dtype, "float32")
    )


def aten_graph(captured: Captured) -> Graph:
    """The Graph view of a captured model."""
    equal: dict[Expr, Expr] = {}
    while True:
        known = len(equal)
        graph = _read(captured, equal)
        if len(equal) == known:
            return graph
        # an operation needs two sizes to be equal: read everything again with one symbol for both


def _read(captured: Captured, equal: dict[Expr, Expr]) -> Graph:
    assumed = dict(equal)
    versions = memory_versions(captured.graph_module.graph)
    infos: dict[str, Info] = {}
    nodes: list[Node] = []
    producer: dict[str, Node] = {}
    inputs: dict[str, GraphInput] = {}
    natives: dict[str, NativeNode] = {}
    owner: dict[str, str] = {}
    hints: dict[str, int] = {}
    outputs: tuple[str, ...] = ()
    roles = {entry.placeholder: entry for entry in captured.inputs}
    for node in captured.graph_module.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            infos[node.name] = _info(value, assumed)
            if node.name in versions.changed:
                infos[node.name + EARLY] = infos[node.name + BETWEEN] = infos[node.name]
                owner[node.name + EARLY] = owner[node.name + BETWEEN] = node.name
            for size in value.shape:
                _note_hints(size, hints)
        elif isinstance(value, torch.SymInt):
            _note_hints(value, hints)
        if node.op == "placeholder" or node.op == "get_attr":
            if node.name not in infos:
                continue
            entry = roles.get(node.name)
            held = getattr(captured.graph_module, node.target, None) if node.op == "get_attr" else None
            inputs[node.name] = GraphInput(
                entry.name if entry else str(node.target),
                entry.role if entry else "constant",
                entry.value if entry and isinstance(entry.value, torch.Tensor) else held,
            )
        elif node.op == "output":
            leaves = torch.utils._pytree.tree_leaves(node.args)
            reads = versions.reads[node.name]
            outputs = tuple(reads[leaf.name] for leaf in leaves if isinstance(leaf, torch.fx.Node))
        elif node.op == "call_function" and isinstance(value, torch.Tensor):
            source = source_line(node)
            natives[node.name] = NativeNode(
                node.name,
                _operation(node.target),
                module_path(node),
                str(source) if source else "",
                module_type(node),
            )
            stated = _state(_Builder(infos, node, versions, equal, producer))
            if node.name in versions.changed:
                stated[-1] = replace(stated[-1], output=node.name + EARLY)
            nodes += stated
            producer.update({made.output: made for made in stated})
            owner.update({made.output: node.name for made in stated})
        nodes += _changed_by(node, versions)
    display = {name[0].upper() + name[1:]: shown for name, shown in captured.size_names.items()}
    signature = {n.name: _signature(n) for n in captured.graph_module.graph.nodes if n.op == "call_function"}
    numbers = {n.name for n in captured.graph_module.graph.nodes if _is_number(n)}
    read = {
        name: tuple(value for other, value in found.items() if other not in numbers)
        for name, found in versions.reads.items()
    }
    evaluator = _Evaluator(captured.graph_module, inputs, versions, assumed)
    return Graph(
        infos,
        tuple(nodes),
        inputs,
        outputs,
        natives,
        owner,
        evaluator,
        hints,
        signature,
        read,
        display,
        versions.overwritten,
    )


def _changed_by(node: torch.fx.Node, versions: Versions) -> list[Node]:
    """The values that this operation is the last to change through another view; what they hold is not
    stated.
    """
    return [
        Opaque(name + suffix, (name + EARLY, *writers), "memory changed in place")
        for name, writers in versions.changed.items()
        if writers[-1] == node.name
        for suffix in (BETWEEN, "")
    ]


def _note_hints(size: Any, hints: dict[str, int]) -> None:
    if isinstance(size, torch.SymInt) and isinstance(size.node.expr, sympy.Symbol):
        hint = size_hint(size)
        if hint is not None:
            name = str(size.node.expr)
            hints[name[0].upper() + name[1:]] = hint


def _is_number(node: torch.fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, int | float | bool) or is_symbolic(value)


def _signature(node: torch.fx.Node) -> str:
    def show(argument: torch.fx.Node) -> str:
        return str(argument.meta["val"]) if _is_number(argument) else "·"

    args = torch.fx.node.map_arg((node.args, dict(node.kwargs)), show)
    return f"{node.target} {args}"


def _state(builder: _Builder) -> list[Node]:
    """The statement of one native node; the last one's output carries the native name."""
    node, infos = builder.node, builder.infos
    out = infos[node.name]
    name = _operation(node.target)
    row = ROWS.get(name.removesuffix("_") if written_arguments(node) else name)
    reason = ""
    if row is not None:
        try:
            last = row(builder, list(node.args), dict(node.kwargs))
            if builder.made and builder.made[-1].output == last:
                builder.made[-1] = replace(builder.made[-1], output=node.name)
                infos.pop(last, None)
                infos[node.name] = out
                return builder.made
        except (_Unstated, ValueError, KeyError) as error:
            reason = str(error)
    infos[node.name] = out
    reads = tuple(dict.fromkeys(_tensors_read(node, builder)))
    whole = (
        _operation(node.args[0].target)
        if name == "getitem" and isinstance(node.args[0], torch.fx.Node)
        else name
    )
    if _is_attention(whole):
        return [RefusedAttention(node.name, reads, whole, reason or "this operator has no statement here")]
    return [Opaque(node.name, reads, whole)]


def _tensors_read(node: torch.fx.Node, builder: _Builder) -> Iterator[str]:
    """The tensor values that a node depends on, looking through tuples and numbers, but not through sizes."""
    for argument in node.all_input_nodes:
        if isinstance(argument.meta.get("val"), torch.Tensor):
            yield builder.value(argument, node)
        elif argument.op == "call_function" and not _operation(argument.target).startswith("sym_"):
            yield from _tensors_read(argument, builder)


def _is_attention(operation: str) -> bool:
    """Whether an operator is a whole attention, by the names that torch gives to its own."""
    return any(
        part in operation
        for part in (
            "scaled_dot_product",
            "flex_attention",
            "multi_head_attention",
            "transformer_encoder_layer",
        )
    )


@dataclass(frozen=True)
class _Evaluator:
    """Runs native nodes on the CPU in float64."""

    module: torch.fx.GraphModule
    inputs: Mapping[str, GraphInput]
    versions: Versions
    equal: Mapping[Expr, Expr]

    def __call__(
        self, wanted: Sequence[str], feeds: Mapping[str, torch.Tensor], sizes: Mapping[str, int]
    ) -> dict[str, torch.Tensor]:
        nodes = {node.name: node for node in self.module.graph.nodes}
        known: dict[str, Any] = dict(feeds)
        needed: set[str] = set()
        stack = list(wanted)
        while stack:
            name = stack.pop()
            if name in needed or name in known:
                continue
            if name.endswith(BETWEEN) or name in self.versions.changed:
                raise ValueError(
                    f"the region reads {name.removesuffix(BETWEEN)!r}, whose memory was changed in place"
                )
            node = nodes[name.removesuffix(EARLY)]
            if _is_number(node):
                known[name] = self._number(node.meta["val"], sizes)
                continue
            if node.op in ("placeholder", "get_attr"):
                given = self.inputs.get(node.name)
                if given is None or given.value is None:
                    raise ValueError(
                        f"the region reads {given.name if given else name!r}, which the Spec does not"
                    )
                known[name] = _wide(given.value)
                continue
            needed.add(name)
            stack += self.versions.reads[node.name].values()
        with torch.no_grad():
            for node in self.module.graph.nodes:
                for name in (node.name, node.name + EARLY):
                    if name in needed:
                        known[name] = self._run(node, known)
        return {name: known[name] for name in wanted}

    def _run(self, node: torch.fx.Node, known: Mapping[str, Any]) -> Any:
        reads, written = self.versions.reads[node.name], written_arguments(node)

        def given(argument: torch.fx.Node) -> Any:
            value = known[reads[argument.name]]
            return value.clone() if argument in written else value  # every version of a value stays as it was

        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), given)
        args, kwargs = torch.utils._pytree.tree_map(_widened_argument, (args, kwargs))
        assert callable(node.target)
        return torch.utils._pytree.tree_map(_widened, node.target(*args, **kwargs))

    def _number(self, value: Any, sizes: Mapping[str, int]) -> Any:
        return (
            concrete(_unified(size_expr(value), self.equal), sizes)
            if isinstance(value, torch.SymInt)
            else value
        )


def _widened(value: Any) -> Any:
    """A tensor that was made in the default dtype, such as ``empty``, in float64."""
    wide = isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype is not torch.float64
    return value.double() if wide else value


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    plain = tensor.detach().cpu()
    return plain.double() if plain.is_floating_point() else plain


def _widened_argument(argument: Any) -> Any:
    if isinstance(argument, torch.dtype) and argument.is_floating_point:
        return torch.float64
    return torch.device("cpu") if isinstance(argument, torch.device) else argument
