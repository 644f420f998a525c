"""What the rows of the ATen table build with: a native node, its arguments, the nodes made so far."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from attncompile.frontends.aten_sizes import broadcast_shapes, size_expr, solved, solved_by_data, unified
from attncompile.frontends.graph import Indices, Info, Iota, Move, Node, Pointwise
from attncompile.frontends.memory import Versions
from attncompile.frontends.torch_internals import is_symbolic
from attncompile.ir import Expr
from attncompile.ir.expr import ONE, ZERO, Const


class Unstated(Exception):
    """This use of the operation has no row; the node stays opaque."""


@dataclass
class Builder:
    """Collects the nodes that one native node is stated as."""

    infos: dict[str, Info]
    node: torch.fx.Node
    versions: Versions
    equal: dict[Expr, Expr]
    producer: Mapping[str, Node]
    made: list[Node] = field(default_factory=list)

    def name(self) -> str:
        """A name for the next value between the parts of this native node."""
        return f"{self.node.name}#{len(self.made)}"

    def value(self, node: torch.fx.Node, reader: torch.fx.Node | None = None) -> str:
        """The value that a node stands for when the reader (this node by default) reads it."""
        return self.versions.reads[(reader or self.node).name].get(node.name, node.name)

    def equate(self, one: Expr, other: Expr) -> None:
        """Note that two sizes must agree, or the operation would fail."""
        if one == other:
            return
        one, other = unified(one, self.equal), unified(other, self.equal)
        found = solved(one, other) or (solved_by_data(one, other) if one != other else None)
        if found is not None:
            symbol, stays = found
            for known, value in self.equal.items():
                self.equal[known] = unified(value, {symbol: stays})
            self.equal[symbol] = stays

    def size(self, size: int | torch.SymInt) -> Expr:
        """A torch size as an expression, one symbol for sizes that must agree."""
        return unified(size_expr(size), self.equal)

    def emit(self, node: Node, info: Info) -> str:
        """Add a node; returns the value that it makes."""
        self.made.append(node)
        self.infos[node.output] = info
        return node.output

    def info(self, value: str) -> Info:
        """Shape and dtype of a value."""
        return self.infos[value]

    def shape(self, value: str) -> Indices:
        """The shape of a value."""
        return self.infos[value].shape

    @property
    def out(self) -> Info:
        """Shape and dtype of the native node's own value."""
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
                raise Unstated
            return self.size(argument)
        if isinstance(argument, bool | int | float):
            return Const(argument)
        raise Unstated

    def tensor(self, argument: Any) -> str:
        """A tensor argument by name; anything else has no row."""
        found = self.operand(argument)
        if not isinstance(found, str):
            raise Unstated
        return found

    def pointwise(self, operation: str, *operands: str | Expr, dtype: str | None = None) -> str:
        """A pointwise operator on broadcast operands, in the native node's dtype unless another is given."""
        shapes = [self.shape(o) for o in operands if isinstance(o, str)]
        shape = broadcast_shapes(shapes)
        for other in shapes:
            for one, size in zip(reversed(shape), reversed(other), strict=False):
                if size != ONE:
                    self.equate(one, size)
        return self.emit(Pointwise(self.name(), operation, operands), Info(shape, dtype or self.out.dtype))

    def move(self, source: str, index_map: Callable[[Indices], Indices], what: str, shape: Indices) -> str:
        """Elements of a value in other places, of a shape."""
        return self.emit(Move(self.name(), source, index_map, what), Info(shape, self.info(source).dtype))

    def index_along(self, axis: int, shape: Indices) -> str:
        """The position along one axis of a shape, as an integer tensor of that shape."""
        iota = self.emit(Iota(self.name(), ZERO, ONE), Info((shape[axis],), "int64"))
        return self.move(iota, lambda indices: (indices[axis],), "iota", shape)


Row = Callable[[Builder, list[Any], dict[str, Any]], str]
"""States one call, given its positional and its keyword arguments; returns the value of the last node it emits.

Raises :class:`Unstated` for a use that it cannot state.
"""


def arguments_of(node: torch.fx.Node) -> dict[str, Any]:
    """Every argument of a call by its name in the schema, defaults included, in the schema's order."""
    if not isinstance(node.target, torch._ops.OpOverload):
        raise Unstated
    given = dict(zip((a.name for a in node.target._schema.arguments), node.args, strict=False))
    return {a.name: given.get(a.name, node.kwargs.get(a.name, a.default_value)) for a in node.target._schema.arguments}


def positional(node: torch.fx.Node) -> tuple[list[Any], dict[str, Any]]:
    """The arguments of a call, each in its place where the schema gives it one; only the others stay keywords."""
    if not isinstance(node.target, torch._ops.OpOverload) or not node.kwargs:
        return list(node.args), dict(node.kwargs)
    args, kwargs = list(node.args), dict(node.kwargs)
    places = [a for a in node.target._schema.arguments if not a.kwarg_only]
    last = max((n for n, a in enumerate(places) if a.name in kwargs), default=-1)
    args += [kwargs.pop(a.name, a.default_value) for a in places[len(args) : last + 1]]
    return args, kwargs


def axis_of(number: int, rank: int) -> int:
    """An axis counted from the front."""
    return number % rank if rank else 0


def as_dtype(value: Expr, dtype: str) -> Expr:
    """A constant as a tensor of this dtype holds it."""
    if not isinstance(value, Const):
        return value
    return Const({"bool": bool}.get(dtype, int if dtype.startswith(("int", "uint")) else float)(value.value))


def is_number(node: torch.fx.Node) -> bool:
    """Whether a node stands for a number or a symbolic one, not for a tensor."""
    value = node.meta.get("val")
    return isinstance(value, int | float | bool) or is_symbolic(value)
