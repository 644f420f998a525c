"""Branches that are decided before the model runs: an ``If`` whose condition follows from constants and sizes.

Exporters of scripted code leave many of them, such as "the tensor has more than two axes" or "the pad is not zero".
What the branch that is never taken would do is of no interest, and a value that both branches make has no known
shape; with the taken branch in the place of the ``If``, everything behind it is stated like any other node.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import onnx_ir as ir

from attncompile.frontends.onnx_bodies import bodies_of
from attncompile.frontends.onnx_known import Known
from attncompile.ir.expr import Const


def inline_decided(model: ir.Model, known: Mapping[str, Known]) -> int:
    """Put the taken branch of every decided ``If`` in its place, in the model; how many there were.

    Bodies of ``Loop`` and ``Scan`` stay as they are: what is known in them holds for the state of their first round,
    and a condition may be decided otherwise in the second.

    Args:
        model: with names that no two values share.
        known: elements of values by name; a condition is decided where its only element is a constant. It must be
            final: nothing in it may rest on a size that is still to be corrected.
    """
    decided = [
        (graph, node, branch)
        for graph in _run_once(model.graph)
        for node in graph
        if (branch := _taken(node, known)) is not None
    ]
    for graph, node, branch in decided:
        _inline(graph, node, branch)
    return len(decided)


def _run_once(graph: ir.Graph) -> Iterator[ir.Graph]:
    """A graph and the branches in it that run at most once, outermost first."""
    yield graph
    for node in graph:
        if node.op_type == "If" and node.domain in ("", "ai.onnx"):
            for _, body in bodies_of(node):
                yield from _run_once(body)


def _taken(node: ir.Node, known: Mapping[str, Known]) -> ir.Graph | None:
    if node.op_type != "If" or node.domain not in ("", "ai.onnx") or not node.inputs or node.inputs[0] is None:
        return None
    condition = known.get(node.inputs[0].name or "")
    if condition is None or len(condition.items) != 1 or not isinstance(condition.items[0], Const):
        return None
    attribute = node.attributes.get("then_branch" if condition.items[0].value else "else_branch")
    return attribute.value if attribute is not None and attribute.type is ir.AttributeType.GRAPH else None


def _inline(graph: ir.Graph, node: ir.Node, branch: ir.Graph) -> None:
    """Move what a branch holds in front of its ``If``, and let its outputs be those of the ``If``."""
    results = list(branch.outputs)
    branch.outputs.clear()
    for name, value in list(branch.initializers.items()):
        del branch.initializers[name]
        graph.register_initializer(value)
    inner = list(branch)
    branch.remove(inner)
    graph.insert_before(node, inner)
    for output, result in zip(node.outputs, results, strict=True):
        if output.is_graph_output():  # whose name is the interface of the model
            same = ir.node("Identity", [result], name=f"{node.name}_{output.name}")
            graph.insert_before(node, same)
            made = same.outputs[0]
            made.type, made.shape = output.type, output.shape
            output.replace_all_uses_with(made, replace_graph_outputs=True)
            made.name, output.name = output.name, f"{output.name}.decided"
        else:
            output.replace_all_uses_with(result)
    graph.remove(node, safe=True)
