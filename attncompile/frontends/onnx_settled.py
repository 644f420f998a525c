"""Results of an ``If`` that are read only where its condition is settled: in one branch of others on that condition.

What several branches need is often made once in front of them, and only where it is needed: ``mask = If(c, nothing,
mask)``, read in the branches that run where ``c`` is false. To all that read it such a result is what one branch gives.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

from attncompile.frontends.onnx_attention import CALLS, CONTRIB_CALLS
from attncompile.frontends.onnx_bodies import PRODUCTS, bodies_of, nested_graphs, nested_nodes

STANDARD = ("", "ai.onnx")

ATTENTION = PRODUCTS | {*CALLS, *CONTRIB_CALLS}
"""Operators that make a branch more than a preparation: attention in it has to read the values there."""


@dataclass(frozen=True)
class Settled:
    """What the settled results of a model are.

    Attributes:
        given: by the name of a result, the value in the branch that it is to whatever reads it.
        inside: values of these branches, which nothing outside them can read.
    """

    given: Mapping[str, str] = field(default_factory=dict)
    inside: frozenset[str] = frozenset()


def settled(model: ir.Model) -> Settled:
    """The results of every ``If`` that are read in one branch of others on its condition, and nowhere else.

    A branch that may hold attention of its own (:data:`ATTENTION`) is left out.

    Args:
        model: with names that no two values share.
    """
    holder = {body: (node, name) for node in nested_nodes(model.graph) for name, body in bodies_of(node)}
    given: dict[str, str] = {}
    inside: set[str] = set()
    for node in nested_nodes(model.graph):
        if not _is_choice(node):
            continue
        taken = {name for output in node.outputs for name in _read_where(node, output, holder)}
        body = dict(bodies_of(node)).get(taken.pop() or "") if len(taken) == 1 else None
        if body is None or any(inner.op_type in ATTENTION for inner in nested_nodes(body)):
            continue
        results = zip(node.outputs, body.outputs, strict=False)
        given |= {output.name: result.name for output, result in results if output.name and result.name}
        inside |= {made.name for part in nested_graphs(body) for made in _values(part) if made.name}
    return Settled(given, frozenset(inside))


def _is_choice(node: ir.Node) -> bool:
    return node.op_type == "If" and node.domain in STANDARD and bool(node.inputs) and node.inputs[0] is not None


def _read_where(
    node: ir.Node, output: ir.Value, holder: Mapping[ir.Graph, tuple[ir.Node, str]]
) -> Iterator[str | None]:
    """For each reader of a result the branch of the same condition that it is in; ``None`` where it is in no such."""
    if output.is_graph_output():
        yield None
    for use in output.uses():
        branch, graph = None, use.node.graph
        while isinstance(graph, ir.Graph) and graph in holder and branch is None:
            around, name = holder[graph]
            branch = name if _is_choice(around) and around.inputs[0] is node.inputs[0] else None
            graph = around.graph
        yield branch


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


__all__ = ["Settled", "settled"]
