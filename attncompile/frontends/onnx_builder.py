"""What the rows of the ONNX table build with: a native node, its inputs, the nodes made so far."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir

from attncompile.frontends import movement
from attncompile.frontends.graph import (
    Cast,
    Concatenate,
    Contract,
    Fill,
    IndexMap,
    Indices,
    Info,
    Iota,
    Move,
    Node,
    Pointwise,
)
from attncompile.frontends.onnx_known import Known
from attncompile.frontends.onnx_sizes import SizeNames, broadcast_shapes
from attncompile.ir import Expr, Kind
from attncompile.ir.expr import ONE, ZERO, Const
from attncompile.ir.types import element_kind


class Unstated(Exception):
    """This use of the operator has no row; the node stays opaque."""


class AttentionRefused(Exception):
    """A native attention call that cannot be stated; the message says why."""


@dataclass
class Builder:
    """Collects the nodes that one output of a native node is stated as.

    Attributes:
        node: the native node.
        output: name of the output, position: its number.
        opset: version of the node's operator set.
        infos: shape and dtype of every value so far; known: elements of small values so far.
        constants: values made of constants alone.
        sizes: the model's symbolic sizes.
        producer: the nodes so far, by the value they make.
    """

    node: ir.Node
    output: str
    position: int
    opset: int
    infos: dict[str, Info]
    known: Mapping[str, Known]
    constants: frozenset[str] | set[str]
    sizes: SizeNames
    producer: Mapping[str, Node] = field(default_factory=dict)
    made: list[Node] = field(default_factory=list)

    def input(self, number: int) -> str | None:
        """Name of an input, or ``None`` when it is not given."""
        value = self.node.inputs[number] if number < len(self.node.inputs) else None
        return value.name if value is not None and value.name else None

    def tensor(self, number: int = 0) -> str:
        """Name of an input that must be there, with a known shape."""
        name = self.input(number)
        if name is None or name not in self.infos:
            raise Unstated
        return name

    def tensors(self) -> list[str]:
        """All inputs."""
        return [self.tensor(number) for number in range(len(self.node.inputs))]

    def elements(self, number: int) -> tuple[Expr, ...]:
        """The elements of a small input."""
        known = self.known.get(self.input(number) or "")
        if known is None:
            raise Unstated
        return known.items

    def scalar(self, number: int) -> Expr:
        """The one element of an input."""
        items = self.elements(number)
        if len(items) != 1:
            raise Unstated
        return items[0]

    def integers(self, number: int) -> tuple[int, ...]:
        """The elements of a constant integer input."""
        known = self.known.get(self.input(number) or "")
        found = known.integers() if known is not None else None
        if found is None:
            raise Unstated
        return found

    def attribute(self, name: str, default: Any = None) -> Any:
        """The value of an attribute."""
        found = self.node.attributes.get(name)
        return default if found is None else found.value

    def listed(self, name: str, number: int) -> tuple[int, ...] | None:
        """Integers that older operator sets take as an attribute, and newer ones as an input."""
        written = self.attribute(name)
        if written is not None:
            return tuple(written)
        return None if self.input(number) is None else self.integers(number)

    def shape(self, value: str) -> Indices:
        return self.infos[value].shape

    def dtype(self, value: str) -> str:
        return self.infos[value].dtype

    def emit(self, make: Callable[[str], Node], shape: Indices, dtype: str) -> str:
        """Add a node, built from the name it shall have."""
        name = f"{self.output}#{len(self.made)}"
        self.made.append(make(name))
        self.infos[name] = Info(tuple(shape), dtype)
        return name

    def pointwise(self, operator: str, *operands: str | Expr, dtype: str | None = None) -> str:
        named = [operand for operand in operands if isinstance(operand, str)]
        shape = broadcast_shapes([self.shape(operand) for operand in named], self.sizes)
        if dtype is None:
            dtype = self.dtype(named[-1 if operator == "where" else 0])
        return self.emit(lambda name: Pointwise(name, operator, operands), shape, dtype)

    def move(self, source: str, index_map: IndexMap, what: str, shape: Indices) -> str:
        return self.emit(lambda name: Move(name, source, index_map, what), shape, self.dtype(source))

    def same(self, source: str) -> str:
        return self.move(source, movement.identity, "same", self.shape(source))

    def reshape(self, source: str, shape: Indices) -> str:
        return self.move(source, movement.reshape(self.shape(source), shape), "reshape", shape)

    def cast(self, source: str, dtype: str) -> str:
        if self.dtype(source) == dtype:
            return self.same(source)
        return self.emit(lambda name: Cast(name, source, dtype), self.shape(source), dtype)

    def number(self, value: float, like: str) -> Const:
        """A constant of the kind of a tensor."""
        kind = element_kind(self.dtype(like))
        return Const(bool(value) if kind is Kind.BOOL else int(value) if kind is Kind.INT else float(value))

    def index_along(self, axis: int, shape: Indices) -> str:
        """The position along one axis of a shape, as an integer tensor of that shape."""
        iota = self.emit(lambda name: Iota(name, ZERO, ONE), (shape[axis],), "int64")
        return self.move(iota, lambda indices: (indices[axis],), "iota", shape)

    def contract(
        self, left: str, right: str, labels: tuple[tuple[str, ...], ...], broadcast: bool = False
    ) -> str:
        """A product of two tensors.

        Unless an axis of size 1 may stand for any size there too (``broadcast``), the sizes of a label that
        is summed over are proven equal by the model running at all.
        """
        sizes: dict[str, Expr] = {}
        equal = set() if broadcast else set(labels[0] + labels[1]) - set(labels[2])
        for tensor, names in ((left, labels[0]), (right, labels[1])):
            for label, size in zip(names, self.shape(tensor), strict=True):
                if label in sizes:
                    (self.sizes.prove_equal if label in equal else self.sizes.meet)(sizes[label], size)
                    sizes[label] = broadcast_shapes([(sizes[label],), (size,)])[0]
                else:
                    sizes[label] = size
        shape = tuple(sizes[label] for label in labels[2])
        return self.emit(lambda name: Contract(name, left, right, *labels), shape, self.dtype(left))


Row = Callable[[Builder], str]


def axis_of(number: int, rank: int) -> int:
    """An axis counted from the front.

    Raises:
        Unstated: for an axis outside the tensor.
    """
    if not -rank <= number < max(rank, 1):
        raise Unstated
    return number % rank if rank else 0


def fills(b: Builder, known: Known) -> str:
    """A small tensor whose elements are known: constants and sizes."""
    items = known.items
    numbers = known.integers()
    if len(set(items)) <= 1:
        return b.emit(lambda name: Fill(name, items[0] if items else ZERO), known.shape, known.dtype)
    if numbers is not None:
        step = numbers[1] - numbers[0]
        if all(number == numbers[0] + step * place for place, number in enumerate(numbers)):
            return b.emit(lambda name: Iota(name, Const(numbers[0]), Const(step)), known.shape, known.dtype)

    def single(item: Expr) -> str:
        return b.emit(lambda name: Fill(name, item), (ONE,), known.dtype)

    parts = tuple(single(item) for item in items)
    return b.emit(lambda name: Concatenate(name, parts, 0), known.shape, known.dtype)


def is_float(b: Builder, value: str) -> bool:
    """Whether a value holds real numbers."""
    return element_kind(b.dtype(value)) is Kind.FLOAT
