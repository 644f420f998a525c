"""What an ONNX model holds below its graph: bodies of ``If``, ``Loop`` and ``Scan``, and local functions.

A body sees the values around it. So that one flat view can hold the graph and its bodies, functions are
inlined where they can be, and every node and value of the model gets a name that no other has: ONNX lets
two branches use one name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from attncompile.frontends.onnx_attention import CALLS, CONTRIB_CALLS


def bodies_of(node: ir.Node) -> tuple[tuple[str, ir.Graph], ...]:
    """The graphs among a node's attributes, each with the attribute's name."""
    found: list[tuple[str, ir.Graph]] = []
    for name, attribute in node.attributes.items():
        if attribute.type is ir.AttributeType.GRAPH:
            found.append((name, attribute.value))
        elif attribute.type is ir.AttributeType.GRAPHS:
            found += [(name, graph) for graph in attribute.value]
    return tuple(found)


def nested_nodes(graph: ir.Graph | ir.Function) -> Iterator[ir.Node]:
    """Every node of a graph and of the bodies inside it; a body's nodes come before the node that holds it."""
    for node in graph:
        for _, body in bodies_of(node):
            yield from nested_nodes(body)
        yield node


def nested_graphs(graph: ir.Graph) -> Iterator[ir.Graph]:
    """A graph and all bodies inside it, outermost first."""
    yield graph
    for node in graph:
        for _, body in bodies_of(node):
            yield from nested_graphs(body)


def nested_values(graph: ir.Graph) -> Iterator[ir.Value]:
    """Every value of a graph and of the bodies inside it: inputs, initialisers, and what nodes make."""
    for part in nested_graphs(graph):
        yield from dict.fromkeys((*part.inputs, *part.initializers.values()))
        for node in part:
            yield from node.outputs


def prepare(model: ir.Model) -> None:
    """Inline functions and give every node and value a name of its own, without changing what is computed.

    ``#`` stays out of names: it marks what lies between the parts of one native node. Names of inputs and
    outputs of the model are left as they are.
    """
    _inline(model)
    nodes: set[str] = set()
    interface = [*model.graph.inputs, *model.graph.initializers.values(), *model.graph.outputs]
    kept = {id(value) for value in interface}
    values = {value.name or "" for value in interface}
    for graph in list(nested_graphs(model.graph)):
        for value in dict.fromkeys((*graph.inputs, *graph.initializers.values())):
            if id(value) not in kept:
                _rename(value, value.name or "body_input", values)
        for number, node in enumerate(graph):
            node.name = _fresh(node.name or f"{node.op_type}_{number}", nodes)
            for position, output in enumerate(node.outputs):
                if id(output) in kept or output.name == "":
                    continue
                plain = output.name if output.name and "#" not in output.name else None
                _rename(output, plain or f"{node.name}_output_{position}", values)


def _rename(value: ir.Value, name: str, taken: set[str]) -> None:
    fresh = _fresh(name.replace("#", "_"), taken)
    if value.name != fresh:
        value.name = fresh


def _fresh(name: str, taken: set[str]) -> str:
    """The name, with a number behind it if it is taken."""
    found, number = name, 1
    while found in taken:
        number += 1
        found = f"{name}_{number}"
    taken.add(found)
    return found


# Local functions


def _inline(model: ir.Model) -> None:
    """Inline the local functions that can be; calls of the others stay."""
    if not model.functions:
        return
    kept = {key for key in model.functions if _obstacle(model, key) is not None}
    InlinePass(criteria=lambda function: function.identifier() not in kept)(model)


def _obstacle(model: ir.Model, key: ir.OperatorIdentifier) -> str | None:
    """Why a function cannot be inlined, or ``None``."""
    function = model.functions[key]
    for domain, version in function.opset_imports.items():
        there = model.opset_imports.get(domain)
        if there is not None and there != version:
            return f"it is written for opset {version} of {domain or 'ai.onnx'}, the model for {there}"
    if any(attribute.type in _GRAPHS for attribute in function.attributes.values()):
        return "it takes a graph as an attribute"
    if key in _called(model, key):
        return "it calls itself"
    return None


_GRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


def _called(model: ir.Model, key: ir.OperatorIdentifier) -> set[ir.OperatorIdentifier]:
    """The functions that a function calls, directly or not."""
    found: set[ir.OperatorIdentifier] = set()
    stack = [key]
    while stack:
        for node in nested_nodes(model.functions[stack.pop()]):
            called = node.op_identifier()
            if called in model.functions and called not in found:
                found.add(called)
                stack.append(called)
    return found


PRODUCTS = frozenset({"MatMul", "Gemm", "Einsum", "FusedMatMul"})
NORMALISERS = frozenset({"Softmax", "LogSoftmax", "Sigmoid", "Exp"})


def hidden_attention(model: ir.Model, node: ir.Node) -> str | None:
    """What to say of a call whose function could not be inlined and may hold attention, else ``None``.

    It may where it, or a function that it calls, holds an attention operator, or a normaliser and two products.
    """
    key = node.op_identifier()
    if key not in model.functions:
        return None
    inside = [inner.op_type for name in (key, *_called(model, key)) for inner in nested_nodes(model.functions[name])]
    fused = any(name in CALLS or name in CONTRIB_CALLS for name in inside)
    spelled = bool(NORMALISERS & set(inside)) and sum(name in PRODUCTS for name in inside) > 1
    if not fused and not spelled:
        return None
    reason = _obstacle(model, key) or "what it calls cannot be inlined"
    return f"its local function {node.domain}::{node.op_type} cannot be inlined: {reason}"


# What a body starts from


def starts(node: ir.Node, body: ir.Graph) -> Iterable[tuple[ir.Value, ir.Value | None, int | None]]:
    """Per input of a body: the input, the outer value that it is at first, and the axis of it that is run over.

    For ``Loop`` and ``Scan``; an input of any other body, and the count and condition of a loop, start from
    nothing that is known.
    """
    given: list[ir.Value | None] = list(node.inputs)
    if node.domain not in ("", "ai.onnx"):
        given = []
    elif node.op_type == "Loop":
        given = [None, None, *given[2:]]
    elif node.op_type != "Scan":
        given = []
    scanned = _scanned(node)
    axes = list(_attribute(node, "scan_input_axes", [])) or [0] * scanned
    for number, value in enumerate(body.inputs):
        place = number - (len(body.inputs) - scanned)
        axis = int(axes[place]) if scanned and 0 <= place < len(axes) else None
        yield value, given[number] if number < len(given) else None, axis


def carried(node: ir.Node, body: ir.Graph) -> Iterable[tuple[ir.Value, ir.Value]]:
    """The states of a ``Loop`` or ``Scan``: the body's input, and the output that it is in the next round."""
    if node.op_type == "Loop":
        return zip(body.inputs[2:], body.outputs[1:], strict=False)
    if node.op_type == "Scan":
        states = len(body.inputs) - _scanned(node)
        return zip(body.inputs[:states], body.outputs[:states], strict=False)
    return ()


def _scanned(node: ir.Node) -> int:
    """How many inputs of a ``Scan`` are run over; they come last."""
    return int(_attribute(node, "num_scan_inputs", 0)) if node.op_type == "Scan" else 0


def _attribute(node: ir.Node, name: str, default: Any) -> Any:
    found = node.attributes.get(name)
    return default if found is None else found.value
