"""A model's view, run node by node and compared with ONNX's reference."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx_ir as ir
import torch

from attncompile.frontends.graph import (
    Contract,
    CumulativeSum,
    FusedAttention,
    Graph,
    Linear,
    Node,
    Opaque,
    Reduce,
    Softmax,
)
from attncompile.frontends.onnx import onnx_graph
from attncompile.ir import Index, Load, Size
from attncompile.ir.evaluate import Environment, evaluate, index_grid
from attncompile.ir.types import concrete
from attncompile.lift.interpret import Interpreter

OPAQUE = (Opaque, FusedAttention)

# Both sides are float64; sums are at most a few dozen terms of order one.
ROUNDING = 64 * float(np.finfo(np.float64).eps)


def parsed(text: str, opset: int = 21) -> ir.Model:
    """A model from a graph in ONNX's text form."""
    return ir.from_proto(
        onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : {opset}, "com.microsoft" : 1]> {text}')
    )


@dataclass(frozen=True)
class Row:
    """A model of one or a few nodes.

    Attributes:
        name: what is tested. body: its nodes. inputs: declarations. constants: initialisers. opset: operator
            set.
        symbols: sizes of its symbolic axes. low, high: range of integer inputs.
    """

    name: str
    body: str
    inputs: str = "float[N,3,4] x"
    constants: str = ""
    opset: int = 21
    symbols: Mapping[str, int] = field(default_factory=lambda: {"N": 5, "M": 7, "K": 6})
    low: int = -3
    high: int = 4

    def model(self) -> ir.Model:
        return parsed(f"g ({self.inputs}) => (y) <{self.constants}> {{ {self.body} }}", self.opset)

    def feeds(self) -> dict[str, np.ndarray]:
        random = np.random.default_rng(0)
        made: dict[str, np.ndarray] = {}
        for value in self.model().graph.inputs:
            shape = [d if isinstance(d, int) else self.symbols[str(d.value)] for d in value.shape or ()]
            kind = value.dtype.numpy() if value.dtype is not None else np.dtype(np.float32)
            if kind == np.bool_:
                made[value.name or ""] = random.random(shape) < 0.5
            elif kind.kind == "f":
                made[value.name or ""] = random.standard_normal(shape).astype(kind)
            else:
                made[value.name or ""] = random.integers(self.low, self.high, shape).astype(kind)
        return made


class SingleNode(Graph):
    """A view of one node, all of whose inputs may be read, also those inside a native node."""

    def is_readable(self, value: str) -> bool:
        return True


def computed(
    graph: Graph, node: Node, values: Mapping[str, torch.Tensor], sizes: Mapping[str, int]
) -> torch.Tensor:
    """One node of the view, from the values it reads, by what the node says."""
    shape = [concrete(size, sizes) for size in graph.infos[node.output].shape]
    if isinstance(node, Contract):
        letters = {
            label: chr(ord("a") + n)
            for n, label in enumerate({**dict.fromkeys(node.left_labels), **dict.fromkeys(node.right_labels)})
        }
        terms = [
            "".join(letters[label] for label in labels)
            for labels in (node.left_labels, node.right_labels, node.output_labels)
        ]
        return torch.einsum(f"{terms[0]},{terms[1]}->{terms[2]}", values[node.left], values[node.right])
    if isinstance(node, Linear):
        weight = values[node.weight] if node.transposed else values[node.weight].T
        made = values[node.source] @ weight
        return made if node.bias is None else made + values[node.bias]
    if isinstance(node, Reduce):
        reduced = {"sum": torch.sum, "max": torch.amax}[node.operator]
        return reduced(values[node.source], dim=node.axes, keepdim=node.keeps_axes)
    if isinstance(node, CumulativeSum):
        source = values[node.source]
        given = source.flip(node.axis) if node.reverse else source
        made = given.cumsum(node.axis) - (given if node.exclusive else 0)
        return made.flip(node.axis) if node.reverse else made
    if isinstance(node, Softmax):
        return torch.softmax(values[node.source], dim=node.axis)
    axes = [f"x{n}" for n in range(len(shape))]
    extents = {axis: graph.infos[node.output].shape[n] for n, axis in enumerate(axes)}
    fields = {field.name: getattr(graph, field.name) for field in dataclasses.fields(graph)}
    alone = SingleNode(**{**fields, "nodes": (node,), "inputs": {}})
    element = Interpreter(alone, extents=extents).at(node.output, tuple(Index(axis) for axis in axes))
    assert element != Load(node.output, tuple(Index(axis) for axis in axes), element.kind)
    grid = index_grid(dict(zip(axes, shape, strict=True)))
    return evaluate(element, Environment(grid, sizes, values)).expand(shape)


def run_view(
    graph: Graph,
    given: Mapping[str, torch.Tensor],
    sizes: Mapping[str, int],
    reference: Callable[[str], torch.Tensor],
) -> dict[str, torch.Tensor]:
    """Every value of the view; what is opaque is asked of the reference."""
    values = dict(given)
    for node in graph.nodes:
        if isinstance(node, OPAQUE):
            if node.output in graph.infos:
                values[node.output] = reference(node.output)
        else:
            values[node.output] = computed(graph, node, values, sizes)
    return values


def compare(model: ir.Model, feeds: Mapping[str, np.ndarray], opaque: tuple[str, ...] = ()) -> Graph:
    """Compare every value of a model's view with ONNX's reference in float64, and require what is stated."""
    graph = onnx_graph(model)
    assert {node.what for node in graph.nodes if isinstance(node, Opaque)} <= set(opaque)
    given = {
        name: torch.from_numpy(value.astype(np.float64) if value.dtype.kind == "f" else value)
        for name, value in feeds.items()
    }
    sizes: dict[str, int] = {}
    for name, value in given.items():
        for size, extent in zip(graph.infos[name].shape, value.shape, strict=True):
            if isinstance(size, Size):
                sizes[size.name] = extent
    constants = {
        name: entry.value.double() if entry.value.is_floating_point() else entry.value
        for name, entry in graph.inputs.items()
        if entry.value is not None
    }
    natives = [name for name in graph.owner if graph.is_native(name) and name not in graph.inputs]
    expected = graph.evaluate(natives, given, sizes)
    found = run_view(graph, {**constants, **given}, sizes, expected.__getitem__)
    for name in natives:
        if name not in graph.infos:
            continue
        assert tuple(found[name].shape) == tuple(expected[name].shape), f"shape of {name}"
        torch.testing.assert_close(
            found[name].double(),
            expected[name].double(),
            rtol=ROUNDING,
            atol=ROUNDING,
            equal_nan=True,
            msg=lambda text, n=name: f"{n}: {text}",
        )
    return graph
