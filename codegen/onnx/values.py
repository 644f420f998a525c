"""Reading and building onnx_ir graphs: producers, constants, uses, and a builder for replacement nodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

MICROSOFT = "com.microsoft"
NUMPY_TYPES: dict[str, ir.DataType] = {
    "float64": ir.DataType.DOUBLE,
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
    "int64": ir.DataType.INT64,
    "int32": ir.DataType.INT32,
    "int8": ir.DataType.INT8,
    "uint8": ir.DataType.UINT8,
    "bool": ir.DataType.BOOL,
}
"""Names of dtypes as a Spec writes them, in ONNX's terms."""


def producer(value: ir.Value | None, *operators: str) -> ir.Node | None:
    """The node that makes the value, when it is a standard operator of one of these names."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.domain == "" and node.op_type in operators else None


def constant(value: ir.Value | None) -> np.ndarray | None:
    """The value's number(s) when they are known before running: an initialiser or a ``Constant`` node."""
    if value is None or value.is_graph_input():
        return None
    known = value.const_value
    if known is None:
        node = producer(value, "Constant")
        if node is None or "value" not in node.attributes:
            return None
        known = node.attributes["value"].as_tensor()
    return np.asarray(known.numpy())


def number(value: ir.Value | None) -> float | None:
    """A single known number, whatever its shape."""
    known = (
        constant(value) if value is None or value.const_value is None or value.const_value.size == 1 else None
    )
    return float(known.reshape(())) if known is not None and known.size == 1 else None


def read_once(value: ir.Value) -> bool:
    """Exactly one node reads the value and it is no output of the graph."""
    return len(value.uses()) == 1 and not value.is_graph_output()


def dimensions(value: ir.Value) -> tuple[int | str | None, ...] | None:
    """The value's axes: a number, a symbol's text, or ``None`` if unknown; ``None`` without a rank."""
    if value.shape is None:
        return None
    return tuple(size if isinstance(size, int) else size.value for size in value.shape)


def known_axis(value: ir.Value, axis: int) -> int | None:
    """The size of one axis when it is a fixed number."""
    sizes = dimensions(value)
    if sizes is None or not -len(sizes) <= axis < len(sizes):
        return None
    size = sizes[axis]
    return size if isinstance(size, int) else None


def redirect(old: ir.Value, new: ir.Value) -> None:
    """Let everybody who reads ``old``, the graph's outputs too, read ``new``; shape and dtype go along."""
    if new.shape is None:
        new.shape = old.shape
    if new.dtype is None and old.dtype is not None:
        new.dtype = old.dtype
    name, output = old.name, old.is_graph_output()
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    if output:
        # the name of an output is part of the model's interface
        old.name, new.name = f"{name}.before", name


def _graph_of(node: ir.Node, default: ir.Graph) -> ir.Graph | ir.Function:
    return node.graph if node.graph is not None else default


def _names_in(graph: ir.Graph) -> set[str]:
    """The names in a graph and its bodies, read once and kept with the graph; builders add theirs."""
    found: set[str] | None = graph.meta.get(_NAMES)
    if found is None:
        found = {value.name or "" for value in (*graph.inputs, *graph.initializers.values())}
        for node in graph.all_nodes():
            found.add(node.name or "")
            found.update(output.name or "" for output in node.outputs)
        graph.meta[_NAMES] = found
    return found


_NAMES = "attncompile.names"


class Builder:
    """Collects new nodes in order and puts them in front of a node of the graph, or of a body inside it.

    Every call makes one node; constants become initialisers of the graph, which its bodies see too, equal
    ones of a model shared by content.
    """

    def __init__(self, graph: ir.Graph, name: str) -> None:
        self.graph = graph
        self.nodes: list[ir.Node] = []
        self._name = name
        self._count = 0
        self._taken = _names_in(graph)

    def fresh(self, label: str) -> str:
        """A name that nothing in the graph has yet; an earlier conversion may have left such names."""
        while True:
            self._count += 1
            name = f"{self._name}.{label}.{self._count}"
            if name not in self._taken:
                self._taken.add(name)
                return name

    def constant(self, value: Any, dtype: str = "int64") -> ir.Value:
        """An initialiser of these numbers."""
        array = np.asarray(value, dtype=dtype)
        key = f"constant.{dtype}.{'x'.join(map(str, array.shape)) or 'scalar'}.{array.tobytes().hex()[:64]}"
        if array.nbytes <= 32 and key in self.graph.initializers:
            return self.graph.initializers[key]
        name = key if array.nbytes <= 32 else self.fresh("constant")
        known = ir.Value(
            name=name,
            shape=ir.Shape(array.shape),
            type=ir.TensorType(NUMPY_TYPES[dtype]),
            const_value=ir.tensor(array, name=name),
        )
        self.graph.register_initializer(known)
        return known

    def __call__(
        self,
        operator: str,
        *inputs: ir.Value | None,
        domain: str = "",
        outputs: int = 1,
        **attributes: Any,
    ) -> Any:
        """One node; its output value, or a tuple of them when ``outputs`` is larger than one."""
        trimmed = list(inputs)
        while trimmed and trimmed[-1] is None:
            trimmed.pop()
        node = ir.node(
            operator,
            trimmed,
            attributes={key: value for key, value in attributes.items() if value is not None},
            domain=domain,
            num_outputs=outputs,
            name=self.fresh(operator),
        )
        for output in node.outputs:
            output.name = self.fresh(operator.lower())
        self.nodes.append(node)
        return node.outputs[0] if outputs == 1 else tuple(node.outputs)

    def insert_before(self, place: ir.Node) -> None:
        """Put the collected nodes into the graph, just before ``place``."""
        _graph_of(place, self.graph).insert_before(place, self.nodes)
        if any(node.domain == MICROSOFT for node in self.nodes):
            self.graph.opset_imports.setdefault(MICROSOFT, 1)
        self.nodes = []

    def insert_after(self, place: ir.Node) -> None:
        """Put the collected nodes into the graph, just after ``place``."""
        _graph_of(place, self.graph).insert_after(place, self.nodes)
        if any(node.domain == MICROSOFT for node in self.nodes):
            self.graph.opset_imports.setdefault(MICROSOFT, 1)
        self.nodes = []


def split_terms(value: ir.Value, limit: int = 4) -> list[ir.Value]:
    """The terms of a sum written as nested ``Add`` nodes, as far as nobody else reads the partial sums."""
    terms: Sequence[ir.Value] = [value]
    while True:
        for place, term in enumerate(terms):
            node = producer(term, "Add")
            if node is not None and len(terms) < limit and (term is value or read_once(term)):
                terms = [
                    *terms[:place],
                    *(side for side in node.inputs if side is not None),
                    *terms[place + 1 :],
                ]
                break
        else:
            return list(terms)
