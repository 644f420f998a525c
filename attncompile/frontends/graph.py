"""One view over FX-ATen and ONNX graphs: what each native node does to *elements*, in a dozen kinds of nodes.

An adapter (:mod:`attncompile.frontends.aten`, :mod:`attncompile.frontends.onnx`) states every native node as
one or a few of these nodes. What it cannot state it leaves :class:`Opaque`, which is always allowed: an
opaque value may still be an operand of attention, or be captured by it. A native node's own value keeps its
native name; a value between the nodes that one native node was split into gets a name with a ``#``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, Protocol

import torch

from attncompile.ir import Expr, Size
from attncompile.ir.expr import walk
from attncompile.ir.simplify import Simplifier

Indices = tuple[Expr, ...]
IndexMap = Callable[[Indices], Indices]
Extents = tuple[tuple[str, Expr], ...]
Role = Literal["parameter", "buffer", "constant", "user"]


@dataclass(frozen=True)
class Info:
    """What is known of a value: its shape, and its dtype as named in :data:`attncompile.ir.types.DTYPES`."""

    shape: Indices
    dtype: str


@dataclass(frozen=True)
class Node:
    """One step. ``output`` names the value it makes; every other field that names a value is listed by
    ``inputs``.
    """

    output: str

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the values it reads."""
        return ()


@dataclass(frozen=True)
class Opaque(Node):
    """Any computation that is not stated further."""

    reads: tuple[str, ...]
    what: str

    @property
    def inputs(self) -> tuple[str, ...]:
        return self.reads


@dataclass(frozen=True)
class RefusedAttention(Opaque):
    """A native attention call that is not stated; ``reason`` completes "the call is not lifted because …"."""

    reason: str


@dataclass(frozen=True)
class Pointwise(Node):
    """A pointwise operator on operands broadcast to the output's shape; a constant is an expression."""

    operator: str
    operands: tuple[str | Expr, ...]

    @property
    def inputs(self) -> tuple[str, ...]:
        return tuple(operand for operand in self.operands if isinstance(operand, str))


@dataclass(frozen=True)
class Cast(Node):
    """The same numbers in another dtype."""

    source: str
    dtype: str

    @property
    def inputs(self) -> tuple[str, ...]:
        return (self.source,)


@dataclass(frozen=True)
class Move(Node):
    """The element at ``indices`` is the source's element at ``index_map(indices)``: views, permutations,
    slices, expands.
    """

    source: str
    index_map: IndexMap
    what: str

    @property
    def inputs(self) -> tuple[str, ...]:
        return (self.source,)


@dataclass(frozen=True)
class Kept(Move):
    """The version of a value that a write to the memory beside it left: the one before."""


@dataclass(frozen=True)
class Concatenate(Node):
    """The parts one after the other along ``axis``."""

    parts: tuple[str, ...]
    axis: int

    @property
    def inputs(self) -> tuple[str, ...]:
        return self.parts


@dataclass(frozen=True)
class Select(Node):
    """The element of ``data`` at positions some of which are read from integer tensors.

    Attributes:
        positions: per axis of ``data``, either an index map giving one index, or a tensor and the map of its
            indices.
        wraps: whether a negative position read from a tensor counts from the end.
    """

    data: str
    positions: tuple[tuple[str | None, IndexMap], ...]
    wraps: bool = True

    @property
    def inputs(self) -> tuple[str, ...]:
        return (self.data, *(tensor for tensor, _ in self.positions if tensor is not None))


@dataclass(frozen=True)
class Write(Node):
    """A value some of whose elements were written through a view of its memory.

    Attributes:
        before: the value as it was.
        written: what the write left in the view.
        place: for the element at some indices, the conditions under which it lies inside the view (all of them must
            hold), and its indices there.
    """

    before: str
    written: str
    place: Callable[[Indices], tuple[Indices, Indices]]

    @property
    def inputs(self) -> tuple[str, ...]:
        return (self.before, self.written)


@dataclass(frozen=True)
class Iota(Node):
    """``start + step · indices[0]``."""

    start: Expr
    step: Expr


@dataclass(frozen=True)
class Fill(Node):
    """The same constant everywhere."""

    value: Expr


@dataclass(frozen=True)
class Contract(Node):
    """A product of two tensors summed over the labels that the output lacks.

    Attributes:
        left, right: the operands; an axis of size 1 whose label is larger elsewhere is broadcast.
        left_labels, right_labels, output_labels: one label per axis.
    """

    left: str
    right: str
    left_labels: tuple[str, ...]
    right_labels: tuple[str, ...]
    output_labels: tuple[str, ...]

    @property
    def inputs(self) -> tuple[str, ...]:
        return (self.left, self.right)

    @property
    def summed(self) -> tuple[str, ...]:
        """The labels that are summed over."""
        return tuple(
            dict.fromkeys(x for x in (*self.left_labels, *self.right_labels) if x not in self.output_labels)
        )


@dataclass(frozen=True)
class Linear(Node):
    """``source @ weight.T + bias``, the weight as ``[outputs, inputs]`` when ``transposed`` is false, else
    ``[inputs, outputs]``.
    """

    source: str
    weight: str
    bias: str | None
    transposed: bool = False

    @property
    def inputs(self) -> tuple[str, ...]:
        return (self.source, self.weight, *([self.bias] if self.bias else []))


@dataclass(frozen=True)
class Reduce(Node):
    """The ``sum`` or ``max`` of a value over some of its axes, which keep size 1 or vanish."""

    source: str
    operator: Literal["sum", "max"]
    axes: tuple[int, ...]
    keeps_axes: bool

    @property
    def inputs(self) -> tuple[str, ...]:
        return (self.source,)


@dataclass(frozen=True)
class CumulativeSum(Node):
    """The sum of a value's elements up to each position of ``axis``, in the output's dtype.

    Attributes:
        exclusive: without the element at the position itself.
        reverse: of the elements from the position on.
    """

    source: str
    axis: int
    exclusive: bool = False
    reverse: bool = False

    @property
    def inputs(self) -> tuple[str, ...]:
        return (self.source,)


@dataclass(frozen=True)
class Softmax(Node):
    """Softmax over ``axis``, computed in the output's dtype."""

    source: str
    axis: int

    @property
    def inputs(self) -> tuple[str, ...]:
        return (self.source,)


@dataclass(frozen=True)
class FusedAttention(Node):
    """Attention as one native call, with its meaning stated through index maps.

    Attributes:
        query, key, value: the operands; ``*_indices`` give their element at ``(b, h, i or j, d or e)``, KV
            heads already chosen for the query head ``h``.
        mask: additive or boolean mask tensor with its element at ``(b, h, i, j)``, or ``None``.
        causal: an expression over ``i j`` that must hold, or ``None``.
        scale: factor of the raw score.
        sizes: batch, query heads, queries, keys, channels of query and key, channels of value.
        output_order: Spec axes in the order of the native output; an axis made of several lists them
            outermost first, such as ``"he"``.
        empty: what a row without any visible key gives.
        mask_fill: logit of a position that a boolean mask hides.
        dtype: dtype of the normaliser.
        softcap: ``cap · tanh(score / cap)`` applied to the scaled score, 0 for none.
        reads: further inputs.
        output_indices: the native output's element at ``(b, h, i, e)``, where the order of its axes does not
            say it.
    """

    query: str
    key: str
    value: str
    query_indices: IndexMap
    key_indices: IndexMap
    value_indices: IndexMap
    mask: str | None
    mask_indices: IndexMap | None
    causal: Expr | None
    scale: float
    sizes: Indices
    output_order: tuple[str, ...]
    dtype: str
    empty: Literal["nan", "zero"] = "zero"
    mask_fill: float = float("-inf")
    softcap: float = 0.0
    reads: tuple[str, ...] = ()
    output_indices: Indices | None = None

    @property
    def inputs(self) -> tuple[str, ...]:
        named = [self.query, self.key, self.value, *([self.mask] if self.mask else []), *self.reads]
        return tuple(dict.fromkeys(named))


@dataclass(frozen=True)
class FusedScan(Opaque):
    """Linear attention as one native call (:class:`attncompile.ir.scan.Scan`), heads packed into the last axis.

    Attributes:
        query: ``[b,t,h·d]``; key: ``[b,t,g·d]``; value: ``[b,t,g·e]``; the output is ``[b,t,h·e]``.
        sizes: batch, query heads, KV heads, steps, channels of query and key, channels of value.
        scale: factor of the output.
        gate: ``[b,t,g·d]``, or ``[b,t,g]`` where ``gate_by_head``; or ``None``.
        rate: ``[b,t,g]``, or ``[b,t,1]`` where ``one_rate``, for the delta rule; or ``None``.
        past: ``[b,g,d,e]``, or ``None``.
        state: name of the value that holds the last state, if anything reads it, else empty.
    """

    query: str
    key: str
    value: str
    sizes: Indices
    scale: float
    gate: str | None = None
    gate_by_head: bool = False
    rate: str | None = None
    one_rate: bool = False
    past: str | None = None
    state: str = ""


@dataclass(frozen=True)
class GraphInput:
    """An input, parameter or constant of the graph.

    Attributes:
        name: what a person calls it.
        value: its tensor, when known.
    """

    name: str
    role: Role
    value: torch.Tensor | None = None


@dataclass(frozen=True)
class NativeNode:
    """What the reports say of a native node."""

    name: str
    what: str
    module: str = ""
    source: str = ""
    module_type: str = ""


@dataclass(frozen=True)
class Rounding:
    """A value that is rounded to a narrow type and read back.

    Attributes:
        output: what is read back; source: the value before it was rounded.
        dtype: the narrow type, such as ``uint8`` or ``float8e4m3fn``.
        scale: of one step of it; ``None`` where there are several, or where it is found in each call.
        dynamic: whether it is found in each call.
    """

    output: str
    source: str
    dtype: str
    scale: float | None = None
    dynamic: bool = False


def _sorted(extents: Mapping[str, Expr]) -> Extents:
    return tuple(sorted(extents.items(), key=lambda entry: entry[0]))


Precision = Callable[[Sequence[str], Sequence[str]], torch.dtype]


class Evaluator(Protocol):
    """Runs native nodes."""

    def __call__(
        self, wanted: Sequence[str], feeds: Mapping[str, torch.Tensor], sizes: Mapping[str, int]
    ) -> dict[str, torch.Tensor]:
        """The wanted native values; see :class:`Graph`."""

    def resized(self, number: Callable[[int], int]) -> Evaluator:
        """The same nodes with every whole number that they hold replaced: shapes, ends of slices, constants' axes.

        Raises:
            ValueError: where that cannot be done.
        """


@dataclass(frozen=True)
class Graph:
    """The view.

    Attributes:
        infos: every value's shape and dtype.
        nodes: in execution order.
        inputs: graph inputs, parameters and constants by value name.
        outputs: values the graph returns.
        natives: per native node name, its description.
        owner: per value name, the native node it belongs to.
        evaluate: runs native nodes in float64: ``evaluate(wanted, feeds, sizes)`` computes the wanted native
            values from fed values, using nothing else but constants. Raises ``ValueError`` when it would need
            another input.
        precision: the dtype in which ``evaluate`` would compute some values from some feeds; ``None`` where
            that is always float64.
        size_hints: symbolic sizes in the example inputs; sizes with one hint are given one value in a proof.
        signature: per native value, text of its operation and attributes (without the names of its inputs).
        overwritten: native values that an in-place operation changes later, so that nothing else may read
            them.
        withheld: sizes that interpretation may not state: no shape would tell them at run time. What reads them is
            loaded.
        entangled: native values in whose place no other tensor can be put, with the reason: what their memory holds is
            written or read later through a tensor that is not made of them.
        effects: values that were written to memory of the caller: they count though nothing may read them.
        roundings: by what is read back, the values that are rounded on their way.
        unrounded: the same graph with each of these passed on as it is; ``None`` where there are none.
    """

    infos: Mapping[str, Info]
    nodes: tuple[Node, ...]
    inputs: Mapping[str, GraphInput]
    outputs: tuple[str, ...]
    natives: Mapping[str, NativeNode]
    owner: Mapping[str, str]
    evaluate: Evaluator
    size_hints: Mapping[str, int] = field(default_factory=dict)
    signature: Mapping[str, str] = field(default_factory=dict)
    native_inputs: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    display_sizes: Mapping[str, str] = field(default_factory=dict)
    overwritten: frozenset[str] = frozenset()
    precision: Precision | None = None
    withheld: frozenset[str] = frozenset()
    entangled: Mapping[str, str] = field(default_factory=dict)
    effects: frozenset[str] = frozenset()
    roundings: Mapping[str, Rounding] = field(default_factory=dict)
    unrounded: Graph | None = None

    @cached_property
    def native_order(self) -> Mapping[str, int]:
        """The place of each native node."""
        return {name: place for place, name in enumerate(self.natives)}

    @cached_property
    def stated_order(self) -> Mapping[str, int]:
        """The place of each value that has a signature or is an input, inputs first."""
        return {name: place for place, name in enumerate(dict.fromkeys((*self.inputs, *self.signature)))}

    @cached_property
    def producer(self) -> Mapping[str, Node]:
        """The node that makes a value."""
        return {node.output: node for node in self.nodes}

    @cached_property
    def users(self) -> Mapping[str, tuple[Node, ...]]:
        """The nodes that read a value."""
        found: dict[str, list[Node]] = {}
        for node in self.nodes:
            for name in dict.fromkeys(node.inputs):
                found.setdefault(name, []).append(node)
        return {name: tuple(nodes) for name, nodes in found.items()}

    @cached_property
    def varying(self) -> frozenset[str]:
        """The values that depend on what the user gives; the others are made of parameters and constants
        alone.
        """
        found = {name for name, given in self.inputs.items() if given.role == "user"}
        for node in self.nodes:
            if any(name in found for name in node.inputs):
                found.add(node.output)
        return frozenset(found)

    @cached_property
    def live(self) -> frozenset[str]:
        """The values that something comes of: a result, or what is written to memory of the caller."""
        return self.ancestors([*self.outputs, *self.effects])

    @cached_property
    def size_names(self) -> frozenset[str]:
        """Names of the symbolic sizes."""
        shapes = (size for info in self.infos.values() for size in info.shape)
        return frozenset(node.name for size in shapes for node in walk(size) if isinstance(node, Size))

    def is_native(self, value: str) -> bool:
        """Whether the value exists in the native graph, not only between the parts of one native node."""
        return "#" not in value

    def is_readable(self, value: str) -> bool:
        """Whether a native value holds what its equations say at any later time: nothing overwrites it."""
        return self.is_native(value) and value not in self.overwritten

    @cached_property
    def position(self) -> Mapping[str, int]:
        """The place of each node in the execution order, by its output."""
        return {node.output: number for number, node in enumerate(self.nodes)}

    @cached_property
    def _simplifiers(self) -> dict[Extents, Simplifier]:
        return {}

    @cached_property
    def _elements(self) -> dict[Extents, dict[tuple[str, Indices], Expr]]:
        return {}

    def simplifier(self, extents: Mapping[str, Expr]) -> Simplifier:
        """The simplifier under these sizes; sites of one shape share it and what it has worked out."""
        key = _sorted(extents)
        return self._simplifiers.setdefault(key, Simplifier(dict(key)))

    def elements(self, extents: Mapping[str, Expr]) -> dict[tuple[str, Indices], Expr]:
        """Where an interpreter keeps the elements that it has stated under these sizes, for others to use."""
        return self._elements.setdefault(_sorted(extents), {})

    def descendants(self, value: str, until: str | None = None) -> frozenset[str]:
        """All values that depend on a value, itself included; only those made no later than ``until``."""
        last = len(self.nodes) if until is None else self.position[until]
        found, stack = {value}, [value]
        while stack:
            for user in self.users.get(stack.pop(), ()):
                if user.output not in found and self.position[user.output] <= last:
                    found.add(user.output)
                    stack.append(user.output)
        return frozenset(found)

    def ancestors(self, values: Iterable[str], within: frozenset[str] | None = None) -> frozenset[str]:
        """All values that some values depend on, themselves included; only those reached ``within`` a set."""
        found = set(values)
        stack = list(found)
        while stack:
            name = stack.pop()
            if name not in self.producer:
                continue
            for read in self.producer[name].inputs:
                if read not in found and (within is None or read in within):
                    found.add(read)
                    stack.append(read)
        return frozenset(found)

    def describe(self, value: str) -> NativeNode:
        """The native node a value belongs to."""
        name = self.owner.get(value, value)
        return self.natives.get(name, NativeNode(name, "input"))
